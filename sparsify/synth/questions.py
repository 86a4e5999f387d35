"""Every question that a scene answers beyond doubt, for each of the 33 templates.

What the questions mean here:

- *heard* (Audio templates): every instrument that sounds, in the picture or not;
- *seen* (Visual templates): every player in the picture, whether he plays, pretends to or rests;
- Audio-Visual templates are about the players in the picture and what *they* play: an instrument that sounds unseen
  is none of "the instruments in the video", comes in neither first nor last and is never the loudest.

Of several seen players of one instrument that is heard, those sound that move while it is heard. Ordinals and
"first", "last" go by the time an instrument comes in. "The instrument on the left of the cello" is its neighbour.
Comparisons need a clear margin, or are not asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise, permutations
from typing import NamedTuple

from sparsify.data.templates import INSTRUMENTS, Template, tidy
from sparsify.synth.scene import Player, Scene, Voice, duration, overlap, place_name

__all__ = ["COUNTS", "Candidate", "candidates_of"]

LOUDER = 8.0  # dB between "louder" and not
RHYTHM = 2.0  # ratio of note rates between "more rhythmic" and not
LONGER = 1.0  # s between "longer" and not
LATER = 0.6  # s between "first" and "second"
TOGETHER = 0.15  # s: onsets this close are simultaneous
SHARED = 0.9  # s of common sound that make "at the same time"; less than APART makes "not"
APART = 0.1
EDGE = 0.2  # s of silence at either end that "always playing" forgives
ENOUGH = 0.8  # s of sound that a comparison of loudness or rhythm needs
PAUSED = 0.75  # share of the clip: who plays less is clearly not "always playing"

COUNTS = ("zero", "one", "two", "three", "four", "five")
_ORDINALS = ("first", "second", "third", "fourth", "fifth")

Found = Iterator[tuple[tuple[str, ...], str, bool]]


class Candidate(NamedTuple):
    """A question that may be asked. ``hard``: seeing or hearing alone suggests the wrong answer."""

    template: Template
    values: tuple[str, ...]
    answer: str
    hard: bool


def candidates_of(scene: Scene, template: Template) -> list[Candidate]:
    """The questions from one template that ``scene`` answers."""
    return [Candidate(template, *found) for found in _FINDERS[tidy(template.text)](scene)]


def _yes(condition: bool) -> str:
    return "yes" if condition else "no"


def _heard_names(scene: Scene) -> set[str]:
    return {v.instrument for v in scene.heard}


def _seen_names(scene: Scene) -> set[str]:
    return {p.instrument for p in scene.seen}


def _alone(scene: Scene) -> dict[str, Voice]:
    """The heard instruments of which a single one sounds."""
    count = Counter(v.instrument for v in scene.heard)
    return {v.instrument: v for v in scene.heard if count[v.instrument] == 1}


def _sounding(scene: Scene) -> list[tuple[int, Player, Voice]]:
    """Index, player and voice of the seen players that sound."""
    return [(i, p, p.voice) for i, p in enumerate(scene.seen) if p.voice is not None]


def _distinct(scene: Scene) -> bool:
    """Whether no instrument is played by two of the seen players."""
    names = [p.instrument for p in scene.seen if p.voice is not None]
    return len(names) == len(set(names))


def _is_sound(scene: Scene) -> Found:
    heard, seen = _heard_names(scene), _seen_names(scene)
    for name in INSTRUMENTS:
        yield (name,), _yes(name in heard), (name in heard) != (name in seen)


def _are_sounds(scene: Scene) -> Found:
    heard, seen = sorted(_heard_names(scene)), _seen_names(scene)
    for one in heard:
        for other in INSTRUMENTS:
            if one != other:
                both = other in heard
                yield (one, other), _yes(both), both != (other in seen)
                if not both:
                    yield (other, one), "no", other in seen


def _how_many_heard(scene: Scene) -> Found:
    if len(_alone(scene)) == len(scene.heard) < len(COUNTS):
        yield (), COUNTS[len(scene.heard)], len(scene.heard) != len(scene.seen)


def _louder(scene: Scene) -> Found:
    for (one, a), (other, b) in permutations(_alone(scene).items(), 2):
        if abs(a.level - b.level) >= LOUDER and _enough(a, b):
            yield (one, other), _yes(a.level > b.level), False


def _more_rhythmic(scene: Scene) -> Found:
    for (one, a), (other, b) in permutations(_alone(scene).items(), 2):
        if _rhythms_differ(a, b):
            yield (one, other), _yes(a.rate > b.rate), False


def _longer(scene: Scene) -> Found:
    for (one, a), (other, b) in permutations(_alone(scene).items(), 2):
        difference = duration(a.sounding) - duration(b.sounding)
        if abs(difference) >= LONGER:
            yield (one, other), _yes(difference > 0), False


def _enough(*voices: Voice) -> bool:
    return all(duration(v.sounding) >= ENOUGH for v in voices)


def _rhythms_differ(a: Voice, b: Voice) -> bool:
    return max(a.rate, b.rate) >= RHYTHM * min(a.rate, b.rate) and _enough(a, b)


def _is_seen(scene: Scene) -> Found:
    heard, seen = _heard_names(scene), _seen_names(scene)
    for name in INSTRUMENTS:
        yield (name,), _yes(name in seen), (name in heard) != (name in seen)


def _are_seen(scene: Scene) -> Found:
    seen, heard = sorted(_seen_names(scene)), _heard_names(scene)
    for one in seen:
        for other in INSTRUMENTS:
            if one != other:
                both = other in seen
                yield (one, other), _yes(both), both != (other in heard)
                if not both:
                    yield (other, one), "no", other in heard


def _how_many_types_seen(scene: Scene) -> Found:
    yield (), COUNTS[len(_seen_names(scene))], False


def _how_many_seen(scene: Scene) -> Found:
    count, heard = Counter(p.instrument for p in scene.seen), _heard_names(scene)
    for name in INSTRUMENTS:
        yield (name,), COUNTS[count[name]], count[name] != (name in heard)


def _where_performed(scene: Scene) -> Found:
    yield (), scene.place, False


def _neighbour(scene: Scene) -> Found:
    names = [p.instrument for p in scene.seen]
    for i, name in enumerate(names):
        if names.count(name) == 1:
            if i > 0:
                yield ("left", name), names[i - 1], False
            if i + 1 < len(names):
                yield ("right", name), names[i + 1], False


def _what_is_it(scene: Scene) -> Found:
    if len(scene.seen) == 1:
        yield (), scene.seen[0].instrument, scene.seen[0].voice is None


def _outermost(scene: Scene) -> Found:
    if len(scene.seen) >= 2:
        yield ("leftest",), scene.seen[0].instrument, False
        yield ("rightest",), scene.seen[-1].instrument, False


def _from_the_video(scene: Scene) -> Found:
    if len(scene.heard) == 1 and len(scene.seen) == 1 and not any(p.hidden for p in scene.players):
        yield (), _yes(scene.heard[0].instrument in _seen_names(scene)), False


def _always_playing(scene: Scene) -> Found:
    names = Counter(p.instrument for p in scene.seen)
    for player in scene.seen:
        if names[player.instrument] > 1:
            continue
        sounding = player.voice.sounding if player.voice else ()
        if sounding and sounding[0][0] <= EDGE and sounding[-1][1] >= scene.seconds - EDGE and len(sounding) == 1:
            yield (player.instrument,), "yes", not player.moving
        elif duration(sounding) <= PAUSED * scene.seconds:
            yield (player.instrument,), "no", bool(player.moving)


def _voiceover(scene: Scene) -> Found:
    yield (), _yes(scene.voiceover is not None), False


def _where_loudest(scene: Scene) -> Found:
    sounding = _sounding(scene)
    if len(sounding) < 2 or not _distinct(scene) or not _enough(*(v for _, _, v in sounding)):
        return
    by_level = sorted(sounding, key=lambda entry: entry[2].level)
    for word, best, next_best in (("loudest", by_level[-1], by_level[-2]), ("lowest", by_level[0], by_level[1])):
        place = place_name(best[0], len(scene.seen))
        if place and abs(best[2].level - next_best[2].level) >= LOUDER:
            yield (word,), place, False


def _order(scene: Scene) -> list[tuple[int, Player, Voice]]:
    """The seen players that sound in the order they come in; empty when the order is not clear."""
    order = sorted(_sounding(scene), key=lambda entry: entry[2].onset)
    clear = all(b[2].onset - a[2].onset >= LATER for a, b in pairwise(order))
    return order if clear and _distinct(scene) else []


def _first_and_last(scene: Scene) -> list[tuple[str, int]]:
    """("first" | "last", index of the player). Who comes in last must not stop before another one does."""
    order = _order(scene)
    if len(order) < 2:
        return []
    found = [("first", order[0][0])]
    if order[-1][2].end >= max(v.end for _, _, v in order) - APART:
        found.append(("last", order[-1][0]))
    return found


def _sound_from_place(scene: Scene) -> Found:
    count = len(scene.seen)
    for word, index in _first_and_last(scene):
        for i, player in enumerate(scene.seen):
            place = place_name(i, count)
            if place:
                yield (word, place), _yes(i == index), player.voice is not None


def _same_time(scene: Scene) -> Found:
    if not _distinct(scene) or not _enough(*(v for _, _, v in _sounding(scene))):
        return
    for i, player, voice in _sounding(scene):
        others = [(p, overlap(voice.sounding, v.sounding)) for j, p, v in _sounding(scene) if j != i]
        together = [p.instrument for p, shared in others if shared >= SHARED]
        if len(together) == 1 and all(shared >= SHARED or shared <= APART for _, shared in others):
            yield (player.instrument,), together[0], len(scene.seen) > 2


def _neighbour_of_first(scene: Scene) -> Found:
    for word, index in _first_and_last(scene):
        for side, j in (("left", index - 1), ("right", index + 1)):
            if 0 <= j < len(scene.seen):
                yield (side, word), scene.seen[j].instrument, scene.seen[j].voice is None


def _how_many_sounding(scene: Scene) -> Found:
    count = len(_sounding(scene))
    yield (), COUNTS[count], count not in (len(scene.seen), len(scene.heard))


def _how_many_types_sounding(scene: Scene) -> Found:
    count = len({p.instrument for _, p, _ in _sounding(scene)})
    yield (), COUNTS[count], count not in (len(scene.seen), len(scene.heard))


def _how_many_silent(scene: Scene) -> Found:
    yield (), COUNTS[len(scene.seen) - len(_sounding(scene))], len(scene.heard) != len(_sounding(scene))


def _how_many_sounding_of(scene: Scene) -> Found:
    seen = Counter(p.instrument for p in scene.seen)
    sounding = Counter(p.instrument for _, p, _ in _sounding(scene))
    for name in sorted(seen | Counter(_heard_names(scene))):
        yield (name,), COUNTS[sounding[name]], sounding[name] != seen[name]


def _comparable(scene: Scene) -> Iterator[tuple[tuple[int, Player], tuple[int, Player], bool]]:
    """Pairs of named places, one player of them sounding at least; of its instrument only he does. True: both sound."""
    sounding = Counter(p.instrument for _, p, _ in _sounding(scene))
    for one, other in permutations(enumerate(scene.seen), 2):
        players = (one[1], other[1])
        if any(place_name(i, len(scene.seen)) is None for i in (one[0], other[0])):
            continue
        if any(p.voice and (sounding[p.instrument] > 1 or not _enough(p.voice)) for p in players):
            continue
        if players[0].voice or players[1].voice:
            yield one, other, all(p.voice for p in players)


def _compare(scene: Scene, rhythm: bool) -> Iterator[tuple[tuple[int, Player], tuple[int, Player], str, bool]]:
    for one, other, both in _comparable(scene):
        a, b = one[1].voice, other[1].voice
        if a is None or b is None:
            yield one, other, _yes(a is not None), False
        elif rhythm and _rhythms_differ(a, b):
            yield one, other, _yes(a.rate > b.rate), both
        elif not rhythm and abs(a.level - b.level) >= LOUDER:
            yield one, other, _yes(a.level > b.level), both


def _place_against_place(rhythm: bool) -> Callable[[Scene], Found]:
    def find(scene: Scene) -> Found:
        for (i, _), (j, _), answer, hard in _compare(scene, rhythm):
            yield (_place(scene, i), _place(scene, j)), answer, hard

    return find


def _named_against_named(rhythm: bool) -> Callable[[Scene], Found]:
    def find(scene: Scene) -> Found:
        names = Counter(p.instrument for p in scene.seen)
        for (i, a), (j, b), answer, hard in _compare(scene, rhythm):
            twin = names[a.instrument] > 1 or names[b.instrument] > 1
            yield (a.instrument, _place(scene, i), b.instrument, _place(scene, j)), answer, hard or twin

    return find


def _place(scene: Scene, index: int) -> str:
    return place_name(index, len(scene.seen)) or ""


def _where_first(scene: Scene) -> Found:
    for word, index in _first_and_last(scene):
        place = place_name(index, len(scene.seen))
        if place:
            yield (word,), place, False


def _which_first(scene: Scene) -> Found:
    count = Counter(p.instrument for p in scene.seen)
    for name in sorted(n for n in count if count[n] > 1):
        group = sorted((v.onset, i) for i, p, v in _sounding(scene) if p.instrument == name)
        if not group:
            continue
        if len(group) > 1 and group[-1][0] - group[0][0] <= TOGETHER:
            yield (name, "first"), "simultaneously", len(group) < count[name]
            continue
        onsets = [onset for onset, _ in group]
        for word, index, clear in (
            ("first", group[0][1], len(group) == 1 or onsets[1] - onsets[0] >= LATER),
            ("last", group[-1][1], len(group) > 1 and onsets[-1] - onsets[-2] >= LATER),
        ):
            place = place_name(index, len(scene.seen))
            if clear and place:
                yield (name, word), place, len(group) < count[name]


def _comes_in(scene: Scene) -> Found:
    order = _order(scene)
    if len(order) >= 2:
        for word, (_, player, _) in zip(_ORDINALS, order, strict=False):
            yield (word,), player.instrument, len(order) < len(scene.heard)


def _before_or_after(scene: Scene) -> Found:
    order = _order(scene)
    for k, (_, player, _) in enumerate(order):
        if k == 1:
            yield ("before", player.instrument), order[0][1].instrument, len(order) < len(scene.heard)
        if k == len(order) - 2:
            yield ("after", player.instrument), order[-1][1].instrument, len(order) < len(scene.heard)


_FINDERS: dict[str, Callable[[Scene], Found]] = {
    "Is there a <Object> sound?": _is_sound,
    "How many musical instruments were heard throughout the video?": _how_many_heard,
    "Are there <Object> and <Object> sound?": _are_sounds,
    "Is the <Object> more rhythmic than the <Object>?": _more_rhythmic,
    "Is the <Object> louder than the <Object>?": _louder,
    "Is the <Object> playing longer than the <Object>?": _longer,
    "Is there a <Object> in the entire video?": _is_seen,
    "Are there <Object> and <Object> instruments in the video?": _are_seen,
    "How many types of musical instruments appeared in the entire video?": _how_many_types_seen,
    "How many <Object> are in the entire video?": _how_many_seen,
    "Where is the performance?": _where_performed,
    "What is the instrument on the <LR> of <Object>?": _neighbour,
    "What kind of musical instrument is it?": _what_is_it,
    "What kind of instrument is the <LRer> instrument?": _outermost,
    "Is this sound from the instrument in the video?": _from_the_video,
    "Is the <Object> in the video always playing?": _always_playing,
    "Is there a voiceover?": _voiceover,
    "Where is the <LL> instrument?": _where_loudest,
    "Is the <FL> sound coming from the <LR> instrument?": _sound_from_place,
    "Which is the musical instrument that sounds at the same time as the <Object>?": _same_time,
    "What is the <LR> instrument of the <FL> sounding instrument?": _neighbour_of_first,
    "How many instruments are sounding in the video?": _how_many_sounding,
    "How many types of musical instruments sound in the video?": _how_many_types_sounding,
    "How many instruments in the video did not sound from beginning to end?": _how_many_silent,
    "How many sounding <Object> in the video?": _how_many_sounding_of,
    "Is the instrument on the <LR> more rhythmic than the instrument on the <LR>?": _place_against_place(rhythm=True),
    "Is the instrument on the <LR> louder than the instrument on the <LR>?": _place_against_place(rhythm=False),
    "Is the <Object> on the <LR> more rhythmic than the <Object> on the <LR>?": _named_against_named(rhythm=True),
    "Is the <Object> on the <LR> louder than the <Object> on the <LR>?": _named_against_named(rhythm=False),
    "Where is the <FL> sounding instrument?": _where_first,
    "Which <Object> makes the sound <FL>?": _which_first,
    "What is the <TH> instrument that comes in?": _comes_in,
    "Which instrument makes sounds <BA> the <Object>?": _before_or_after,
}
