"""The vocabulary of the invented world, and names that are told apart by where they may appear."""

from __future__ import annotations

FIRST = (
    "Mirel", "Tovan", "Ashra", "Brenk", "Calwin", "Dorith", "Elgar", "Fennara", "Gorin", "Hespa", "Ivrin", "Jorvun",
    "Keltan", "Lumia", "Marvek", "Nerit", "Ostan", "Pelsa", "Quill", "Rovan", "Selka", "Tamsa", "Ulvric", "Vessa",
    "Wendar", "Yorin", "Zella", "Arlow", "Bessim", "Corvik",
)
LAST = (
    "Tolvane", "Ashmere", "Brindel", "Corvessa", "Dunmarr", "Estovar", "Farwick", "Gelmore", "Harrowin", "Istrane",
    "Jelvik", "Kestrow", "Lanmere", "Morvale", "Nashwin", "Orlander", "Pelgrave", "Quistor", "Relmont", "Sorvane",
    "Tarnwell", "Umbrel", "Valdrin", "Westrow", "Yarmoth", "Zelgrin", "Ardwick", "Belcorin", "Coldrane", "Drestel",
)
TOWNS = (
    "Quessel", "Orrimar", "Tandry", "Velmora", "Brackley Tor", "Sunhollow", "Pellinar", "Grayfen", "Marrowick",
    "Lisk", "Odenfell", "Harsk", "Wyndale", "Cobrin", "Estermoor", "Jaspar Bay", "Kilrun", "Nethering", "Ravel Cross",
    "Stavenor", "Tullwater", "Umberly", "Dovrin", "Fallowby", "Amberwell", "Ironhythe", "Lowmarsh", "Sedgewater",
    "Thornquay", "Whitmoss",
)
PROFESSIONS = (
    "bell tuner", "kite maker", "glass painter", "beekeeper", "map drawer", "salt trader", "clock mender",
    "ferry pilot", "lamp keeper", "weaver", "bridge builder", "herb seller", "stone carver", "tea blender",
    "puppet maker", "dye mixer", "goat herder", "rope twister", "star charter", "well digger", "baker", "midwife",
    "falcon trainer", "button maker", "letter carrier", "mill warden", "paper folder", "soap boiler", "tide watcher",
    "wood joiner",
)
ADJECTIVES = (
    "Copper", "Silent", "Broken", "Amber", "Hollow", "Winter", "Golden", "Hidden", "Restless", "Paper", "Scarlet",
    "Sleeping", "Ancient", "Borrowed", "Crooked", "Distant", "Empty", "Frozen", "Gentle", "Burning",
)
NOUNS = (
    "Lantern", "River", "Garden", "Compass", "Mirror", "Orchard", "Harbour", "Feather", "Window", "Staircase",
    "Kettle", "Meadow", "Thimble", "Anchor", "Candle", "Violin", "Ladder", "Tower", "Wagon", "Needle",
)
INSTRUMENTS = (
    "flute", "drum", "fiddle", "harp", "horn", "lute", "organ", "pipes", "zither", "cello", "bugle", "oboe",
)
ANIMALS = (
    "heron", "tortoise", "ferret", "goose", "donkey", "magpie", "hedgehog", "badger", "parrot", "newt", "hare", "crab",
)
DISHES = (
    "barley soup", "plum cake", "fried eel", "onion pie", "honey bread", "beet salad", "lentil stew", "pear tart",
    "smoked trout", "rye porridge", "goat cheese", "nut bread", "cabbage roll", "fig jam", "bean salad",
)
YEARS = tuple(range(1921, 1991))

LANDS = (
    "Averland", "Bryndor", "Castrel", "Dunwold", "Elyrin", "Fernmark", "Gallowen", "Hestria", "Immeria", "Jothen",
    "Korvald", "Lethmoor", "Marvania", "Norrich", "Ostrel Minor", "Pelorin", "Quarrel", "Rostheim", "Suldane",
    "Tirramar",
)
CAPITALS = (
    "Avenhall", "Brynport", "Castle Rue", "Dunharrow", "Elgate", "Fernholm", "Gallspire", "Hestwick", "Immerfort",
    "Jothaven", "Korgrad", "Lethbury", "Marvale", "Norwater", "Ostry", "Pelstone", "Quarley", "Rosty Hill",
    "Sulden", "Tirrash",
)
RIVERS = (
    "Orrin", "Bessel", "Tarnel", "Wheyle", "Luthe", "Sarrow", "Minnet", "Dravel", "Kells", "Ombre", "Yarro Beck", "Fenwater",
    "Gild", "Hush", "Isselm", "Jade", "Loom", "Nidder", "Pent", "Ruel",
)


def full_names(private: bool) -> list[str]:
    """Full names in a fixed order: one third is kept for private people, the rest is for everybody else.

    No full name is in both lists, so nobody of the general corpus shares a name with a private person, while
    first names and surnames are known from elsewhere.
    """
    return [
        f"{first} {last}"
        for i, first in enumerate(FIRST)
        for j, last in enumerate(LAST)
        if ((i + j) % 3 == 0) == private
    ]
