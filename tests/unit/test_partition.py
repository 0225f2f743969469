"""Who owns which row: properties of every scheme, and the manifest."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unfed.base.artifacts import digest_file
from unfed.base.errors import ArtifactError, DataError
from unfed.data.datasets import DatasetSpec, data_digest, load_rows
from unfed.data.partition import DEALERS, Partition, PartitionSpec, make_partition
from unfed.data.topics import default_topics, find_topics


def rows(count: int, author_rows: int | None = None) -> list[dict]:
    found = [{"id": f"r{n:03}", "question": f"word{n % 11}", "answer": f"thing{n % 7}"} for n in range(count)]
    return found if author_rows is None else [{**r, "author": n // author_rows} for n, r in enumerate(found)]


BEFORE = {
    "iid": "sha256:e3047da90ecd2caf3d2a2d5eeab84a009eafb70e953e90184254e1557b7b38cf",
    "author": "sha256:3a534afd7359ddfc0b646595a6c4996636629ba6286b2e60e611086e0257a446",
    "dirichlet": "sha256:72d03e20f3e07d6b83c22681320139c348f89704f21ac4370b5d93e04b261174",
    "quantity": "sha256:6effc27b87ce47cdb30a1effb5089bfc96b419460a5701ea054579b6b736de94",
    "target": "sha256:a6d6826ed511ead4e81b5ca9a519305d780691703a55e18372851ee9cd974d00",
}
ALPHA = st.sampled_from([1e-6, 0.05, 0.5, 5.0, 100.0])


@settings(deadline=None, max_examples=120)
@given(
    st.sampled_from(["iid", "dirichlet", "quantity"]),
    st.sampled_from(["author", "author", "topic"]),
    st.integers(1, 90),
    st.integers(1, 12),
    ALPHA,
    st.integers(0, 9),
)
def test_every_row_has_one_owner_and_nobody_is_empty(scheme, over, count, clients, alpha, seed):
    data = rows(count)
    how = PartitionSpec(scheme, alpha=alpha, over=over)
    if clients > count:
        with pytest.raises(DataError, match=f"num_clients={clients} is more than the {count} examples"):
            make_partition(data, clients, how, seed=seed)
        return
    found = make_partition(data, clients, how, seed=seed)
    assert list(found.clients) == [f"client_{c}" for c in range(clients)]
    assert sorted(i for ids in found.clients.values() for i in ids) == [r["id"] for r in data]
    assert all(ids and list(ids) == sorted(ids) for ids in found.clients.values())
    assert found == make_partition(data, clients, how, seed=seed)


@settings(deadline=None, max_examples=120)
@given(
    st.sampled_from(sorted(DEALERS)),
    st.integers(1, 60),
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(0, 9),
    ALPHA,
)
def test_the_target_owns_every_forget_row(rest, retain, forget, clients, seed, alpha):
    data = rows(retain + forget, 3)
    target = seed % clients
    wanted = [r["id"] for r in data[retain:]]
    how = PartitionSpec("target", rest, alpha, target)
    people_left = -(-retain // 3)
    receivers = clients if retain >= clients else clients - 1
    if retain < clients - 1 or (rest == "author" and people_left < receivers):
        with pytest.raises(DataError, match=r"too few|more than the"):
            make_partition(data, clients, how, wanted, seed)
        return
    if rest == "topic" and retain:  # how many topics the rows beside the target's have, is known when they are found
        topics = find_topics(data, default_topics(len(data), clients), seed)
        if sum(not set(wanted).issuperset(t.ids) for t in topics) < receivers:
            with pytest.raises(DataError, match="topics are too few"):
                make_partition(data, clients, how, wanted, seed)
            return
    found = make_partition(data, clients, how, wanted, seed)
    assert found.owners(wanted) == {f"client_{target}": tuple(wanted)}
    assert sorted(i for ids in found.clients.values() for i in ids) == [r["id"] for r in data]
    assert all(found.clients.values())
    if retain >= clients:
        assert len(found.rows_of(f"client_{target}")) > len(wanted)  # it has a share of the others too


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 15), st.integers(1, 8), st.integers(1, 6), st.integers(0, 5))
def test_people_stay_together(people, each, clients, seed):
    data = rows(people * each, each)
    if clients > people * each or clients > people:
        with pytest.raises(DataError, match=r"too few for|more than the"):
            make_partition(data, clients, PartitionSpec("author"), seed=seed)
        return
    found = make_partition(data, clients, PartitionSpec("author"), seed=seed)
    homes = {}
    for row in data:
        homes.setdefault(row["author"], set()).add(found.owner(row["id"]))
    assert all(len(owners) == 1 for owners in homes.values())
    counts = [len(ids) // each for ids in found.clients.values()]
    assert max(counts) - min(counts) <= 1


def test_tofu_people_are_blocks_of_twenty_rows_also_beside_the_forget_set():
    data = rows(140)
    found = make_partition(data, 3, PartitionSpec("target", "author"), [r["id"] for r in data[100:]])
    for start in range(0, 100, 20):
        assert len({found.owner(r["id"]) for r in data[start : start + 20]}) == 1


def test_a_target_without_a_share_owns_the_forget_rows_and_nothing_else():
    data = rows(60)
    forget = [r["id"] for r in data[50:]]
    found = make_partition(data, 3, PartitionSpec(target_client_idx=1, target_shares=False), forget)
    assert list(found.rows_of("client_1")) == forget
    assert [len(ids) for ids in found.clients.values()] == [25, 10, 25]


def test_equal_shares_are_equal_and_alpha_decides_how_unequal_others_are():
    data = rows(600, 20)

    def sizes(scheme: str, alpha: float) -> list[int]:
        return [len(ids) for ids in make_partition(data, 4, PartitionSpec(scheme, alpha=alpha)).clients.values()]

    assert sizes("iid", 0.5) == [150] * 4
    assert max(sizes("quantity", 0.1)) > 300 and max(sizes("quantity", 1e4)) < 170
    assert max(sizes("dirichlet", 1e4)) < 190

    def largest_share(alpha: float) -> float:
        """Mean over people of the largest share that one client has of a person's rows."""
        found = make_partition(data, 4, PartitionSpec("dirichlet", alpha=alpha))
        owners = [[found.owner(r["id"]) for r in data[a : a + 20]] for a in range(0, 600, 20)]
        return sum(max(o.count(c) for c in found.clients) / 20 for o in owners) / len(owners)

    assert largest_share(0.01) > 0.9 and largest_share(1e4) < 0.5


@pytest.mark.parametrize("scheme", ["iid", "author", "dirichlet", "quantity", "target"])
def test_a_manifest_of_an_older_scheme_is_what_it_was(scheme, tmp_path: Path):
    """Digests of what was written before there were topics: neither the draw nor a byte of the file changed."""
    data = [{"id": f"r{n:03}", "question": "q", "answer": "a"} for n in range(90)]
    made = make_partition(data, 4, PartitionSpec(scheme, rest="dirichlet"), [r["id"] for r in data[80:]], seed=5)
    made.write(tmp_path / "partition.json")
    assert digest_file(tmp_path / "partition.json") == BEFORE[scheme]


def test_the_seed_decides():
    data = rows(50)
    one, other = (make_partition(data, 3, PartitionSpec("iid"), seed=s) for s in (0, 1))
    assert one.clients != other.clients and one.data_digest == other.data_digest == data_digest(data)


@pytest.mark.parametrize(
    ("clients", "how", "forget", "said"),
    [
        (3, PartitionSpec("targt"), ["r000"], "partition.scheme='targt' is unknown; did you mean 'target'"),
        (3, PartitionSpec(rest="target"), ["r000"], "partition.rest='target' is unknown"),
        (3, PartitionSpec("dirichlet", over="topics"), (), "partition.over='topics' is unknown; did you mean 'topic'"),
        (3, PartitionSpec("topic", topics=11), (), "partition.topics=11 with 10 rows to deal: use 1 to 10"),
        (3, PartitionSpec("topic", topics=0), (), "partition.topics=0 with 10 rows"),
        (3, PartitionSpec("topic", topics=2), (), "2 topics are too few for 3 clients"),
        (3, PartitionSpec("dirichlet", alpha=0), (), r"partition.alpha=0; .* above 0"),
        (3, PartitionSpec("dirichlet", alpha=float("nan")), (), r"partition.alpha=nan"),
        (3, PartitionSpec(target_client_idx=3), ["r000"], "target_client_idx=3 with num_clients=3: use 0 to 2"),
        (0, PartitionSpec("iid"), (), "num_clients=0"),
        (1, PartitionSpec(target_shares=False), ["r000"], "target_shares=false: 9 rows .* nobody to deal them to"),
        (3, PartitionSpec(), (), "needs forget rows .*there are none"),
        (3, PartitionSpec(), ["r000", "zzz"], "1 of 2 forget rows are not among the 10 training rows"),
        (3, PartitionSpec(), [f"r{n:03}" for n in range(9)], "1 rows beside the forget set are too few for 2"),
    ],
)
def test_what_cannot_be_dealt_is_refused(clients, how, forget, said):
    with pytest.raises(DataError, match=said):
        make_partition(rows(10), clients, how, forget)


def test_ids_that_repeat_are_refused():
    with pytest.raises(DataError, match="same id"):
        make_partition([*rows(3), rows(1)[0]], 2, PartitionSpec("iid"))


def test_the_manifest_comes_back_as_it_was_written(tmp_path: Path):
    data = load_rows(DatasetSpec("fictional", "full"))
    forget = [e["id"] for e in load_rows(DatasetSpec("fictional", "forget25"))]
    made = make_partition(data, 3, PartitionSpec(target_client_idx=1), forget, 7)
    made.write(tmp_path / "partition.json")
    read = Partition.read(tmp_path / "partition.json")
    assert read == made and read.client_ids == ("client_0", "client_1", "client_2")
    with pytest.raises(DataError, match="no client 'client_9'"):
        read.rows_of("client_9")
    with pytest.raises(DataError, match=r"1 of 2 rows belong to no client of the partition .the first: stranger"):
        read.owners([forget[0], "stranger"])
    assert read.owner("stranger") is None


def test_new_rows_are_dealt_and_everybody_keeps_what_they_own():
    old = make_partition(rows(40), 3, PartitionSpec("iid"), seed=1)
    more = [*rows(40)[30:], *({**r, "id": f"new-{r['id']}"} for r in rows(9))]
    new = old.unknown(more)
    assert [e["id"] for e in new] == [e["id"] for e in more[10:]]
    grown = old.extended(make_partition(new, 3, PartitionSpec("iid"), seed=2))
    for client, ids in old.clients.items():
        assert grown.rows_of(client)[: len(ids)] == ids and len(grown.rows_of(client)) == len(ids) + 3
    assert not grown.unknown(more) and grown.data_digest != old.data_digest


def test_the_order_of_many_clients_survives(tmp_path: Path):
    made = make_partition(rows(12), 12, PartitionSpec("iid"))
    made.write(tmp_path / "p.json")
    assert Partition.read(tmp_path / "p.json").client_ids == tuple(f"client_{c}" for c in range(12))


def test_an_altered_or_malformed_manifest_is_refused(tmp_path: Path):
    path = tmp_path / "partition.json"
    make_partition(rows(6), 2, PartitionSpec("iid")).write(path)
    good = json.loads(path.read_text())
    moved = {**good, "clients": {"client_0": [r["id"] for r in rows(6)][:5], "client_1": ["r005"]}}
    for bad, said in ((moved, "was altered"), ({"clients": 3}, "not a partition manifest"), ([], "not a partition")):
        path.write_text(json.dumps(bad))
        with pytest.raises(ArtifactError, match=said):
            Partition.read(path)
    path.write_text("{")
    with pytest.raises(ArtifactError, match="cannot read"):
        Partition.read(path)
    Partition({"client_0": ("a",), "client_1": ("a",)}, "iid", 0, "d").write(path)
    with pytest.raises(ArtifactError, match="deals a row twice"):
        Partition.read(path)
