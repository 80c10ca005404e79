"""The sentences of task words: six kinds of story, each with its measures, its units and several ways to tell every event.

Slots: {name} the person, {other} someone else, {n} a number, {measure} a measure in the plural, {unit} what is counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

EVENTS = ("start", "start_measure", "+", "-", "+measure", "-measure", "*", "/", "~", "question")


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """measures: name -> units in it. phrases: event -> ways to tell it, the plainest first."""

    units: Sequence[str]
    measures: Mapping[str, int]
    phrases: Mapping[str, Sequence[str]]


NAMES = (
    "Mia", "Tom", "Ana", "Ben", "Lea", "Sam", "Ida", "Max", "Eva", "Jon", "Zoe", "Kai", "Noor", "Omar", "Ruth", "Hugo", "Vera", "Ivan", "Lin", "Ravi",
    "Sara", "Paul", "Nina", "Theo",
)  # fmt: skip

SHOP = Story(
    units=("pens", "cups", "books", "plates", "nails", "apples", "candles", "lamps"),
    measures={"crate": 9, "box": 6, "sack": 8, "tray": 4, "basket": 5, "dozen": 12},
    phrases={
        "start": ("{name} has {n} {unit}.", "There are {n} {unit} in the shop of {name}.", "{name} opens the shop with {n} {unit}."),
        "start_measure": (
            "{name} buys {n} {measure} of {unit}.",
            "{n} {measure} of {unit} stand in the shop of {name}.",
            "{name} opens the shop with {n} {measure} of {unit}.",
        ),
        "+": ("{name} buys {n} more.", "Then {n} more {unit} arrive.", "{other} brings back {n} {unit}."),
        "-": ("{name} sells {n}.", "{n} of the {unit} are broken and thrown away.", "{other} pays for {n} of them and takes them along."),
        "+measure": ("{name} buys {n} {measure} more.", "Then {n} {measure} of {unit} arrive.", "{other} brings {n} {measure} of {unit}."),
        "-measure": ("{name} sells {n} {measure}.", "{other} takes {n} {measure} of {unit} along.", "{n} {measure} of {unit} are sold before noon."),
        "*": ("By noon {name} has {n} times as many.", "A delivery makes it {n} times as many.", "{name} then stocks {n} times as many."),
        "/": (
            "{name} keeps one of {n} equal parts.",
            "{n} shops share them equally, and {name} owns one.",
            "They go in equal parts to {n} shelves, and {name} keeps one shelf.",
        ),
        "~": ("{other} is {n} years old.", "The shop has been open for {n} days.", "There are {n} chairs in the shop."),
        "question": ("How many {unit} does {name} have now?", "What is the number of {unit} that {name} has now?", "Count the {unit} of {name}."),
    },
)

SHARES = Story(
    units=("sweets", "nuts", "cherries", "cards", "stamps", "coins", "stones", "shells"),
    measures={"bag": 7, "jar": 11, "tin": 3, "packet": 10, "bowl": 5, "pair": 2},
    phrases={
        "start": ("{name} has {n} {unit}.", "{name} finds {n} {unit} on the table.", "In the drawer of {name} are {n} {unit}."),
        "start_measure": (
            "{name} has {n} {measure} of {unit}.",
            "{name} finds {n} {measure} of {unit} on the table.",
            "In the drawer of {name} are {n} {measure} of {unit}.",
        ),
        "+": ("{name} gets {n} more.", "{other} gives {name} {n} {unit}.", "{n} {unit} are added to them."),
        "-": ("{name} loses {n}.", "{name} gives {n} {unit} to {other}.", "{other} takes {n} of them away."),
        "+measure": (
            "{name} gets {n} {measure} more.",
            "{other} gives {name} {n} {measure} of {unit}.",
            "{n} {measure} of {unit} are added to them.",
        ),
        "-measure": (
            "{name} loses {n} {measure}.",
            "{name} gives {n} {measure} of {unit} to {other}.",
            "{other} takes {n} {measure} of {unit} away.",
        ),
        "*": (
            "Soon {name} has {n} times as many.",
            "{name} wins until there are {n} times as many.",
            "{other} helps to make them {n} times as many.",
        ),
        "/": (
            "{name} shares them equally among {n} and keeps a part.",
            "{n} children share them equally, and {name} is one of them.",
            "{name} makes {n} equal heaps and keeps one.",
        ),
        "~": ("{other} has {n} brothers and cousins.", "The party began {n} minutes ago.", "{n} guests are in the garden."),
        "question": (
            "How many {unit} does {name} have now?",
            "What is the number of {unit} that {name} has in the end?",
            "How many {unit} are left for {name}?",
        ),
    },
)

DISTANCES = Story(
    units=("miles",),
    measures={"league": 3, "stage": 8, "lap": 4, "march": 12, "loop": 6, "trail": 9},
    phrases={
        "start": ("{name} walks {n} {unit}.", "The way of {name} is {n} {unit} long.", "{name} plans a walk of {n} {unit}."),
        "start_measure": ("{name} walks {n} {measure}.", "The way of {name} is {n} {measure} long.", "{name} plans a walk of {n} {measure}."),
        "+": ("{name} walks {n} {unit} more.", "A detour adds {n} {unit} to it.", "The bridge is closed, which makes it {n} {unit} longer."),
        "-": ("A bus takes {name} for {n} {unit} of it.", "A new path makes it {n} {unit} shorter.", "{name} leaves out the last {n} {unit}."),
        "+measure": (
            "{name} walks {n} {measure} more.",
            "A detour adds {n} {measure} to it.",
            "The bridge is closed, which makes it {n} {measure} longer.",
        ),
        "-measure": (
            "A bus takes {name} for {n} {measure} of it.",
            "A new path makes it {n} {measure} shorter.",
            "{name} leaves out the last {n} {measure}.",
        ),
        "*": ("{name} does so on {n} days.", "{name} then goes {n} times as far.", "In the end it is {n} times as long."),
        "/": (
            "{n} people share the way equally, {name} is one.",
            "{name} goes only one of {n} equal parts.",
            "It is cut into {n} equal parts, and {name} walks one.",
        ),
        "~": ("The hill is {n} metres high.", "{other} walks beside {name} with {n} dogs.", "{name} rests for {n} minutes."),
        "question": ("How many {unit} does {name} walk?", "How long is the walk of {name}, in {unit}?", "How many {unit} are these for {name}?"),
    },
)

AGES = Story(
    units=("years",),
    measures={"decade": 10, "span": 7, "era": 11, "reign": 8, "term": 4, "score": 20},
    phrases={
        "start": (
            "The house of {name} is {n} {unit} old.",
            "{name} lives in a house that is {n} {unit} old.",
            "The first mill of {name} is {n} {unit} old.",
        ),
        "start_measure": (
            "The house of {name} is {n} {measure} old.",
            "{name} lives in a house that is {n} {measure} old.",
            "The first mill of {name} is {n} {measure} old.",
        ),
        "+": ("The barn is {n} {unit} older than that.", "The tower was built {n} {unit} before that.", "Add {n} {unit} for the age of the well."),
        "-": (
            "The fence is {n} {unit} younger than that.",
            "The school was built {n} {unit} after that.",
            "Take off {n} {unit} for the age of the gate.",
        ),
        "+measure": (
            "The barn is {n} {measure} older than that.",
            "The tower was built {n} {measure} before that.",
            "Add {n} {measure} for the age of the well.",
        ),
        "-measure": (
            "The fence is {n} {measure} younger than that.",
            "The school was built {n} {measure} after that.",
            "Take off {n} {measure} for the age of the gate.",
        ),
        "*": ("The church is {n} times as old.", "The oak is {n} times that age.", "The old wall has {n} times as many {unit}."),
        "/": (
            "The garden has one of {n} equal parts of that age.",
            "Divide that by {n} for the age of the street.",
            "The orchard is so old that {n} times its age is that.",
        ),
        "~": ("The house has {n} windows.", "{other} lives at number {n}.", "The tree is {n} metres high."),
        "question": (
            "How old is the last one, in {unit}?",
            "What is the age of the last one in {unit}?",
            "How many {unit} old is the thing named last?",
        ),
    },
)

RATES = Story(
    units=("toys", "bolts", "loaves", "bricks", "shirts", "wheels"),
    measures={"batch": 6, "load": 12, "pallet": 10, "cart": 5, "run": 7, "rack": 3},
    phrases={
        "start": ("A machine makes {n} {unit} an hour.", "{name} makes {n} {unit} an hour.", "Every hour {n} {unit} leave the factory of {name}."),
        "start_measure": (
            "A machine makes {n} {measure} of {unit} an hour.",
            "{name} makes {n} {measure} of {unit} an hour.",
            "Every hour {n} {measure} of {unit} leave the factory of {name}.",
        ),
        "+": ("By hand {n} more are made.", "{other} makes {n} {unit} more.", "{n} {unit} from the store are added."),
        "-": ("{n} of them are bad.", "{other} takes {n} {unit} out again.", "The test rejects {n} {unit}."),
        "+measure": (
            "By hand {n} {measure} more are made.",
            "{other} makes {n} {measure} of {unit} more.",
            "{n} {measure} of {unit} from the store are added.",
        ),
        "-measure": (
            "{n} {measure} of them are bad.",
            "{other} takes {n} {measure} of {unit} out again.",
            "The test rejects {n} {measure} of {unit}.",
        ),
        "*": ("This goes on for {n} hours.", "The same is done for {n} hours.", "After {n} hours of this the work stops."),
        "/": (
            "They go in equal parts to {n} towns, one is ours.",
            "{n} customers share them equally, one of them {name}.",
            "Packed in {n} equal lots, one lot goes to {name}.",
        ),
        "~": ("The machine weighs {n} tons.", "{other} has worked here for {n} years.", "The hall has {n} doors."),
        "question": ("How many {unit} does {name} get?", "How many {unit} is that for {name}?", "What is the number of {unit} that reach {name}?"),
    },
)

TIME = Story(
    units=("minutes",),
    measures={"lesson": 9, "bell": 8, "round": 5, "watch": 11, "turn": 3, "break": 4},
    phrases={
        "start": ("{name} works for {n} {unit}.", "The work of {name} takes {n} {unit}.", "{name} sits down to read for {n} {unit}."),
        "start_measure": (
            "{name} works for {n} {measure}.",
            "The work of {name} takes {n} {measure}.",
            "{name} sits down to read for {n} {measure}.",
        ),
        "+": ("{name} goes on for {n} {unit}.", "Cleaning up takes {n} {unit} more.", "{other} asks {name} for {n} {unit} more."),
        "-": ("{n} {unit} of it are a pause.", "{other} saves {name} {n} {unit} of it.", "{name} stops {n} {unit} early."),
        "+measure": ("{name} goes on for {n} {measure}.", "Cleaning up takes {n} {measure} more.", "{other} asks {name} for {n} {measure} more."),
        "-measure": ("{n} {measure} of it are a pause.", "{other} saves {name} {n} {measure} of it.", "{name} stops {n} {measure} early."),
        "*": ("{name} does so on {n} days.", "In a week this happens {n} times.", "The whole is done {n} times."),
        "/": (
            "{n} people share it equally, {name} is one.",
            "Of {n} equal parts of it {name} does one.",
            "Split into {n} equal parts, one is for {name}.",
        ),
        "~": ("The room has {n} lamps.", "{other} is {n} years old.", "{name} drinks {n} cups of tea."),
        "question": ("How many {unit} does {name} spend?", "How long is that for {name}, in {unit}?", "What is the number of {unit} for {name}?"),
    },
)

STORIES: dict[str, Story] = {"shop": SHOP, "shares": SHARES, "distances": DISTANCES, "ages": AGES, "rates": RATES, "time": TIME}


def plural(measure: str) -> str:
    """crate -> crates, box -> boxes."""
    return measure + ("es" if measure.endswith(("x", "ch", "s")) else "s")
