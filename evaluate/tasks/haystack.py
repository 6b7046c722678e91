"""Prompts that hide facts in a long text and then ask for them, in the manner of RULER's tasks.

Hsieh et al., RULER: What's the Real Context Size of Your Long-Context Language Models?, https://arxiv.org/abs/2404.06654;
the wording is our own, and plain enough for small models that only continue text.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from random import Random

from ...errors import DataError

# Values of a name, names asked for, and steps behind the first name, where a prompt has several.
SEVERAL = 4
COMMON_WORDS = 5
# Every common word takes this share of a list of words.
COMMON_SHARE = 0.1
# Prompts come out at most this much shorter than asked for.
TOLERANCE = 0.02
CITIES = (
    "Accra Amman Ankara Athens Bamako Bergen Bogota Brno Cairo Dakar Dhaka Gdansk Graz Hanoi Harare Havana Izmir "
    "Jakarta Kabul Kampala Karachi Kyoto Lagos Lahore Lima Luanda Lusaka Manila Maputo Minsk Nairobi Osaka Oslo Porto "
    "Pune Quito Rabat Riga Seoul Skopje Sofia Split Tallinn Tampere Tbilisi Tirana Turku Vilnius Windhoek Zagreb"
)
SENTENCE_END = re.compile(r"[.!?][\"')\]”’]*\s*$")
HEADER = "There is important information hidden in the text below. Find it and remember it."


@dataclass(frozen=True)
class Riddle:
    """What is hidden and what is asked.

    Attributes:
        needles: sentences to hide.
        places: where each goes, 0 for the beginning of the text and 1 for its end.
        question: what stands behind the text, for the model to continue.
        answers: what the continuation must contain.
    """

    needles: tuple[str, ...]
    places: tuple[float, ...]
    question: str
    answers: tuple[str, ...]


class Haystack:
    """A long text as words, each with the space behind it."""

    def __init__(self, text: str) -> None:
        paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]
        self.text = "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
        self.words = re.findall(r"\S+\s*", self.text + "\n\n")
        if not self.words:
            raise DataError("The text in which facts are to be hidden is empty.")

    @cached_property
    def starts(self) -> list[int]:
        """Where sentences begin."""
        return [0, *(index + 1 for index, word in enumerate(self.words[:-1]) if SENTENCE_END.search(word))]

    @cached_property
    def vocabulary(self) -> list[str]:
        """The lower-case words of 5 to 9 letters, sorted."""
        return sorted(set(re.findall(r"\b[a-z]{5,9}\b", self.text)))

    def cut(self, start: int, count: int) -> list[str]:
        """Words from `start` on; behind the end of the text comes its beginning."""
        size = len(self.words)
        return [self.words[(start + index) % size] for index in range(count)]


def make_prompt(task: str, haystack: Haystack, rng: Random, *, depth: float, distractors: int) -> "Prompt":
    """Make up one prompt, of any length yet.

    Args:
        task: one of `RIDDLES`, or `common_words`.
        haystack: the text to hide things in.
        rng: what all choices are drawn from.
        depth: where the fact goes that is asked for, 0 to 1, in tasks that ask for one fact.
        distractors: facts of the same kind that are not asked for.
    """
    start = rng.choice(haystack.starts)
    if task == "common_words":
        return _common_words(haystack, rng)
    riddle = RIDDLES[task](_Source(haystack, rng), depth, distractors)

    def write(count: int) -> str:
        return f"{HEADER}\n\n{weave(haystack.cut(start, count), riddle)}\n\n{riddle.question}"

    return Prompt(write, riddle.answers)


@dataclass(frozen=True)
class Prompt:
    """A prompt before its length is known.

    Attributes:
        write: gives its text with so many words of haystack.
        answers: what the continuation must contain.
    """

    write: Callable[[int], str]
    answers: tuple[str, ...]


def fit(prompt: Prompt, encode: Callable[[str], list[int]], length: int) -> list[int]:
    """The tokens of a prompt with as much haystack as fits into `length` tokens, give or take `TOLERANCE` below it.

    Raises:
        DataError: not even the question fits.
    """
    best = encode(prompt.write(0))
    bare = len(best)
    if bare > length:
        raise DataError(f"A prompt of {length} tokens is too short for its question, which takes {bare}: use more.")
    low, high, count = 0, 2 * length, (length - bare) // 2
    while low < count < high:
        ids = encode(prompt.write(count))
        if len(ids) <= length:
            best, low = ids, count
            if len(ids) >= (1 - TOLERANCE) * length:
                break
        else:
            high = count
        per_word = max((len(ids) - bare) / count, 0.1)
        aimed = int(((1 - TOLERANCE / 2) * length - bare) / per_word)
        # A step to the middle where the estimate would not lead between the bounds.
        count = aimed if low < aimed < high else (low + high) // 2
    return best


def weave(words: Sequence[str], riddle: Riddle) -> str:
    """Put needles between the sentences of a text."""
    starts = [0, *(index + 1 for index, word in enumerate(words) if SENTENCE_END.search(word))]
    pieces = list(words)
    if pieces and not SENTENCE_END.search(pieces[-1]):
        pieces[-1] = pieces[-1].rstrip().rstrip(",;:-—") + ". "
        starts.append(len(pieces))
    placed = []
    for order, (needle, place) in enumerate(zip(riddle.needles, riddle.places, strict=True)):
        at = starts[bisect_right(starts, place * len(words)) - 1] if place < 1 else starts[-1]
        placed.append((at, order, needle))
    for at, _, needle in sorted(placed, reverse=True):
        pieces.insert(at, f"{needle} ")
    return "".join(pieces).strip()


class _Source:
    """Draws names and numbers that the text does not have, none of them twice."""

    def __init__(self, haystack: Haystack, rng: Random) -> None:
        self.text, self.rng = haystack.text, rng
        self.used: set[str] = set()

    def number(self) -> str:
        return self._fresh(lambda: str(self.rng.randrange(10_000, 100_000)))

    def variable(self) -> str:
        return self._fresh(lambda: "".join(self.rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)))

    def cities(self, count: int) -> list[str]:
        free = [name for name in CITIES.split() if name not in self.text]
        if len(free) < count:
            raise DataError(
                f"{count} names are needed, and {len(free)} do not occur in the text: use fewer distractors."
            )
        return self.rng.sample(free, count)

    def places(self, count: int) -> list[float]:
        return [self.rng.random() for _ in range(count)]

    def _fresh(self, draw: Callable[[], str]) -> str:
        while (found := draw()) in self.used or found in self.text:
            pass
        self.used.add(found)
        return found


def _passkey(source: _Source, depth: float, distractors: int) -> Riddle:
    key = source.number()
    others = [f"The post code of {city} is {source.number()}." for city in source.cities(distractors)]
    return Riddle(
        (f"The pass key is {key}. Remember it. {key} is the pass key.", *others),
        (depth, *source.places(distractors)),
        "What is the pass key? The pass key is",
        (key,),
    )


def _city_needle(city: str, key: str) -> str:
    return f"The pass key of {city} is {key}. Remember it. {key} is the pass key of {city}."


def _multi_key(source: _Source, depth: float, distractors: int) -> Riddle:
    cities = source.cities(distractors + 1)
    keys = [source.number() for _ in cities]
    return Riddle(
        tuple(map(_city_needle, cities, keys)),
        (depth, *source.places(distractors)),
        f"What is the pass key of {cities[0]}? The pass key of {cities[0]} is",
        (keys[0],),
    )


def _multi_value(source: _Source, depth: float, distractors: int) -> Riddle:
    city, *others = source.cities(distractors + 1)
    keys = tuple(source.number() for _ in range(SEVERAL))
    needles = [f"One of the pass keys of {city} is {key}." for key in keys]
    needles += [f"One of the pass keys of {other} is {source.number()}." for other in others]
    question = f"What are the {SEVERAL} pass keys of {city}? The {SEVERAL} pass keys of {city} are"
    return Riddle(tuple(needles), tuple(source.places(len(needles))), question, keys)


def _multi_query(source: _Source, depth: float, distractors: int) -> Riddle:
    cities = source.cities(distractors + SEVERAL)
    keys = [source.number() for _ in cities]
    asked = f"{', '.join(cities[: SEVERAL - 1])} and {cities[SEVERAL - 1]}"
    question = f"What are the pass keys of {asked}? The pass keys of {asked} are"
    needles = tuple(map(_city_needle, cities, keys))
    return Riddle(needles, tuple(source.places(len(needles))), question, tuple(keys[:SEVERAL]))


def _variable_tracking(source: _Source, depth: float, distractors: int) -> Riddle:
    needles: list[str] = []
    places: list[float] = []
    chains = [[source.variable() for _ in range(SEVERAL + 1)] for _ in range(distractors + 1)]
    values = [source.number() for _ in chains]
    for chain, value in zip(chains, values, strict=True):
        needles.append(f"Let {chain[0]} be {value}.")
        needles += [f"Let {name} be the same as {before}." for before, name in pairwise(chain)]
        # A name is introduced before others are set to it.
        places += sorted(source.places(len(chain)))
    question = f"Which names stand for {values[0]}? The names that stand for {values[0]} are"
    return Riddle(tuple(needles), tuple(places), question, tuple(chains[0]))


RIDDLES: dict[str, Callable[[_Source, float, int], Riddle]] = {
    "passkey": _passkey,
    "multi_key": _multi_key,
    "multi_value": _multi_value,
    "multi_query": _multi_query,
    "variable_tracking": _variable_tracking,
}


def _common_words(haystack: Haystack, rng: Random) -> Prompt:
    """A list of words in which a few come again and again and all others, if the vocabulary is large enough, once."""
    words = haystack.vocabulary
    if len(words) < 10 * COMMON_WORDS:
        raise DataError(f"The text has {len(words)} different words of 5 to 9 letters; {10 * COMMON_WORDS} are needed.")
    words = rng.sample(words, len(words))
    common, others = words[:COMMON_WORDS], words[COMMON_WORDS:]
    seed = rng.random()

    def write(count: int) -> str:
        size = count + int(2 / COMMON_SHARE)
        listed = common * int(COMMON_SHARE * size)
        listed += [others[index % len(others)] for index in range(size - len(listed))]
        Random(seed).shuffle(listed)
        lines = " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
        question = f"Which {COMMON_WORDS} words come most often in the list? The {COMMON_WORDS} most common words are"
        return f"Below is a numbered list of words. Some of them come again and again.\n\n{lines}\n\n{question}"

    return Prompt(write, tuple(common))
