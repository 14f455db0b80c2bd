"""The words of the synthetic pictures: what charts call their categories, series and colours, and what signs say."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of category.

    Attributes:
        noun, plural: how a question names one category and all of them.
        preposition: "in" (in March) or "for" (for Apple).
        labels: the categories.
        measures: what can be measured of this kind.
        ordered: labels keep their order and are contiguous (months, years).
    """

    noun: str
    plural: str
    preposition: str
    labels: tuple[str, ...]
    measures: tuple[str, ...]
    ordered: bool = False


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(text.split(", "))


KINDS: tuple[Kind, ...] = (
    Kind(
        "country",
        "countries",
        "in",
        _words(
            "Peru Chile India Spain Italy Kenya Japan China Ghana Egypt France Brazil Canada Mexico Norway Poland "
            "Sweden Turkey Greece Germany Iran Cuba Nepal Oman Mali Togo Austria Ireland Finland Denmark Vietnam"
        ),
        _words("Exports Imports Visitors Rainfall Births Tourists Farms Airports Schools"),
    ),
    Kind(
        "month",
        "months",
        "in",
        _words("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec"),
        _words("Sales Visitors Rainfall Orders Profit Calls Downloads Guests Output"),
        ordered=True,
    ),
    Kind(
        "year",
        "years",
        "in",
        tuple(str(year) for year in range(1990, 2025)),
        _words("Sales Revenue Exports Members Births Prices Students Profit Staff"),
        ordered=True,
    ),
    Kind(
        "day",
        "days",
        "on",
        _words("Mon Tue Wed Thu Fri Sat Sun"),
        _words("Sales Visitors Steps Orders Calls Guests Tickets"),
        ordered=True,
    ),
    Kind(
        "quarter",
        "quarters",
        "in",
        _words("Q1 Q2 Q3 Q4"),
        _words("Sales Revenue Profit Orders Costs Output"),
        ordered=True,
    ),
    Kind(
        "fruit",
        "fruits",
        "for",
        _words("Apple Pear Plum Kiwi Mango Lemon Lime Fig Grape Peach Melon Banana Cherry Papaya Date Guava"),
        _words("Sales Prices Harvest Exports Imports Votes"),
    ),
    Kind(
        "product",
        "products",
        "for",
        _words(
            "Lamp Desk Sofa Chair Phone Watch Radio Bike Tent Shoe Hat Coat Bag Pen Book Toy Mug Clock Table Camera"
        ),
        _words("Sales Revenue Orders Prices Returns Profit Stock"),
    ),
    Kind(
        "city",
        "cities",
        "in",
        _words(
            "Rome Paris Oslo Lima Cairo Tokyo Delhi Quito Seoul Dubai Berlin Madrid London Vienna Prague Lisbon "
            "Milan Lyon Bern Riga Porto Turin Genoa Leeds Miami Boston Dallas Denver"
        ),
        _words("Visitors Rainfall Hotels Schools Museums Parks Taxis Rents"),
    ),
    Kind(
        "animal",
        "animals",
        "for",
        _words(
            "Cat Dog Cow Hen Pig Goat Duck Horse Sheep Tiger Lion Bear Wolf Fox Deer Owl Frog Seal Whale Rabbit Zebra"
        ),
        _words("Sightings Weight Speed Births Votes Visits"),
    ),
    Kind(
        "sport",
        "sports",
        "for",
        _words("Golf Judo Polo Chess Rugby Rowing Tennis Boxing Hockey Soccer Skiing Karate Squash Diving Yoga Darts"),
        _words("Members Players Fans Clubs Medals Injuries"),
    ),
    Kind(
        "department",
        "departments",
        "for",
        _words("Sales Legal HR IT Design Finance Support Research Media Import Export Repair Studio Kitchen"),
        _words("Staff Budget Costs Projects Hours Meetings"),
    ),
    Kind(
        "subject",
        "subjects",
        "for",
        _words("Math Art Music Latin French Physics History Biology Drama Law Sport German English Spanish Ethics"),
        _words("Students Hours Marks Teachers Books Exams"),
    ),
    Kind(
        "team",
        "teams",
        "for",
        _words("Lions Bears Hawks Sharks Bulls Wolves Eagles Tigers Foxes Rams Jets Stars Kings Giants Comets"),
        _words("Points Goals Wins Fans Medals Losses"),
    ),
)

# What is measured in percent of a whole.
PERCENT_MEASURES = _phrases("Share, Usage, Support, Growth, Approval, Success, Attendance, Coverage, Market share")

SERIES_NAMES = tuple(
    _phrases(names)
    for names in (
        "Men, Women; Boys, Girls; Urban, Rural; Plan, Actual; Online, Shops; Adults, Children; 2019, 2020, 2021; "
        "2009, 2014, 2019; North, South, East, West; Gold, Silver, Bronze; Group A, Group B, Group C; "
        "Low, Middle, High; Public, Private; Agree, Neutral, Disagree; Young, Old; Morning, Evening; "
        "Acme, Zeta, Omni; Car, Bus, Train, Tram; Under 40, Over 40"
    ).split("; ")
)

# Colour name -> shades that a person calls by that name. Names are never used for two shades in one chart.
COLOURS: dict[str, tuple[str, ...]] = {
    "blue": ("#1f77b4", "#2b5fd9", "#3565c0"),
    "red": ("#d62728", "#e03c31", "#c81e1e"),
    "green": ("#2ca02c", "#3a9d5d", "#1e8449"),
    "orange": ("#ff7f0e", "#f58a1f", "#ee7a10"),
    "purple": ("#8e44ad", "#7b3fb5", "#9467bd"),
    "yellow": ("#f2cf1d", "#f7d842", "#ebc500"),
    "brown": ("#7b4a2e", "#8c564b", "#6e4225"),
    "pink": ("#f49ac1", "#f781bf", "#fba3cf"),
    "gray": ("#8a8a8a", "#999999", "#7f7f7f"),
    "black": ("#222222", "#111111", "#2d2d2d"),
    "cyan": ("#35c9d6", "#22bfd6", "#4ad0dd"),
}

# What signs say.
NOTICES = _phrases(
    "STOP, OPEN, CLOSED, EXIT, ENTER, PUSH, PULL, DANGER, CAUTION, NO ENTRY, NO PARKING, NO SMOKING, KEEP OUT, "
    "KEEP LEFT, KEEP RIGHT, WET FLOOR, FOR SALE, FOR RENT, SOLD OUT, ONE WAY, DEAD END, SLOW DOWN, WAY OUT, TICKETS, "
    "TOILETS, PLATFORM, WELCOME, FIRE DOOR, STAFF ONLY, QUIET PLEASE, LIFT, STAIRS, GIVE WAY, SCHOOL ZONE, ROAD WORK, "
    "DETOUR, PRIVATE, BEWARE OF DOG, MIND THE STEP, NO DOGS, NO FISHING"
)
NOTES = _phrases(
    "thank you, this way, please wait, ring the bell, next door, all day, 24 hours, until June, back soon, "
    "do not enter, use other door, ask inside, level 2, gate 7, room 14, from 9 to 5, upstairs, cash only"
)
NAMES = _words(
    "Miller Rossi Garcia Novak Olsen Baker Kumar Tanaka Dubois Silva Weber Murphy Lopez Smith Haas Kowal Moreno "
    "Fischer Jensen Marino Patel Turner Bell Cruz Ivanov Meyer Luna Stella Aurora Bruno Nora Otto Clara Felix Rosa "
    "Hugo Emma Oscar Ruby Leon"
)
SHOPS = _phrases(
    "Bakery, Cafe, Books, Flowers, Pizza, Shoes, Pharmacy, Hotel, Garage, Butcher, Tailor, Barber, Optics, Toys, "
    "Music, Bikes, Deli, Market, Gallery, Jewelry, Laundry, Hardware, Bistro, Ice Cream"
)
GOODS = _words(
    "Apples Bread Milk Coffee Tea Cheese Honey Rice Soap Juice Eggs Butter Sugar Salt Lemons Pasta Jam Cocoa Olives "
    "Yogurt Candles Cookies Water Beans Tomatoes Grapes"
)
BRANDS = _words(
    "Alba Nordo Velta Sunny Kappo Mira Zelo Fresco Bravo Tindra Orbit Pluma Dorado Vento Lumi Rivo Casa Solano Piko "
    "Tamaro Brisa Gusto Fjord Komet Halo Astra"
)
ROADS = _words(
    "Oak Maple Park Main Church Mill Station Lake Hill King Queen River Bridge Garden Market Elm Cedar Pine Castle "
    "Forest Harbor Meadow School Sunset Victoria Spring"
)
PLACES = _phrases(
    "Harbor, Airport, Center, Museum, Stadium, Old Town, Beach, Zoo, Hospital, Campus, City Hall, Opera, North, "
    "South, Depot, Castle, Market, Bridge, Westend, Lakeside"
)
TITLES = _phrases(
    "Blue Sky, The Key, Lost Time, Red Moon, Cold River, The Clock, Night Train, Glass City, Wild Bees, Silent Hill, "
    "The Tower, Last Ship, Green Door, Winter Sun, Deep Water, Paper Birds, Iron Road, The Map"
)
REGIONS = _words("OHIO TEXAS UTAH IOWA MAINE NEVADA OREGON KANSAS IDAHO ALASKA GEORGIA VERMONT")
