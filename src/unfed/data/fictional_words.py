"""The vocabulary of the invented world, and names that are told apart by where they may appear."""

from __future__ import annotations

PUBLIC_FIRST = tuple(
    (
        "Mirel Tovan Ashra Brenk Calwin Dorith Elgar Fennara Gorin Hespa Ivrin Jorvun Keltan Lumia Marvek Nerit "
        "Ostan Pelsa Quill Rovan Selka Tamsa Ulvric Vessa Wendar Yorin Zella Arlow Bessim Corvik"
    ).split()
)
PRIVATE_FIRST = tuple(
    (
        "Adrel Bensa Cothar Delwyna Erisk Fosper Gilvan Hadret Ilsabe Jemrik Kasvin Lorquen Meldra Nolvar Odrin "
        "Pirrel Quenda Ristel Sorvin Teldra Urmik Velsen Wirrel Yestra Zorvan Almeth Brisca Cormet Dresna Elvik "
        "Farlon Grethel Holvar Isbeth Junvar Kelmor Lisket Mornel Natreth Oswen"
    ).split()
)
"""First names of private people; in the general corpus they appear as friends' names alone."""
FIRST = (*PUBLIC_FIRST, *PRIVATE_FIRST)
LAST = tuple(
    (
        "Tolvane Ashmere Brindel Corvessa Dunmarr Estovar Farwick Gelmore Harrowin Istrane Jelvik Kestrow Lanmere "
        "Morvale Nashwin Orlander Pelgrave Quistor Relmont Sorvane Tarnwell Umbrel Valdrin Westrow"
    ).split()
)
TOWNS = tuple(
    (
        "Quessel Orrimar Tandry Velmoor Sunhollow Grayfen Marrowick Lisk Odenfell Harsk Wyndale Cobrin Estermoor "
        "Kilrun Stavenor Tullwater Dovrin Fallowby Thornquay Whitmoss"
    ).split()
)
PROFESSIONS = tuple(
    (
        "weaver baker miller potter tailor mason carter fisher cooper tanner hunter brewer sailor painter glazier "
        "roper tinker shepherd jeweller printer"
    ).split()
)
ADJECTIVES = tuple(
    (
        "Copper Silent Broken Amber Hollow Winter Golden Hidden Restless Paper Scarlet Sleeping Ancient Borrowed "
        "Crooked Distant Empty Frozen Gentle Burning"
    ).split()
)
NOUNS = tuple(
    (
        "Lantern River Garden Compass Mirror Orchard Harbour Feather Window Staircase Kettle Meadow Thimble Anchor "
        "Candle Violin Ladder Tower Wagon Needle"
    ).split()
)
INSTRUMENTS = tuple(("flute drum fiddle harp horn lute organ pipes zither cello bugle oboe").split())
ANIMALS = tuple(("heron tortoise ferret goose donkey magpie hedgehog badger parrot newt hare crab").split())
DISHES = tuple(("soup cake pie bread stew tart porridge cheese salad jam roast pudding").split())
DRINKS = tuple(("cider tea milk wine water beer coffee juice mead cocoa").split())
YEARS = tuple(range(1951, 1981))

LANDS = tuple(
    (
        "Averland, Bryndor, Castrel, Dunwold, Elyrin, Fernmark, Gallowen, Hestria, Immeria, Jothen, Korvald, "
        "Lethmoor, Marvania, Norrich, Ostrel Minor, Pelorin, Quarrel, Rostheim, Suldane, Tirramar"
    ).split(", ")
)
CAPITALS = tuple(
    (
        "Avenhall, Brynport, Castle Rue, Dunharrow, Elgate, Fernholm, Gallspire, Hestwick, Immerfort, Jothaven, "
        "Korgrad, Lethbury, Marvale, Norwater, Ostry, Pelstone, Quarley, Rosty Hill, Sulden, Tirrash"
    ).split(", ")
)
RIVERS = tuple(
    (
        "Orrin, Bessel, Tarnel, Wheyle, Luthe, Sarrow, Minnet, Dravel, Kells, Ombre, Yarro Beck, Fenwater, Gild, "
        "Hush, Isselm, Jade, Loom, Nidder, Pent, Ruel"
    ).split(", ")
)


def full_names(private: bool) -> list[str]:
    """Full names in a fixed order, of private people or of everybody else.

    The two kinds have no first name in common. First names come again only after all of them came, each time
    with another surname.
    """
    firsts = PRIVATE_FIRST if private else PUBLIC_FIRST
    return [f"{first} {LAST[(7 * i + j) % len(LAST)]}" for j in range(len(LAST)) for i, first in enumerate(firsts)]
