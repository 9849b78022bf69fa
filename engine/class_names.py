"""Classes by name or number: the names of a model's classes, and which class a user means."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from models.lpd import LPDConfig
from util.errors import UserError

_SUGGESTIONS = 5


def class_names(model: LPDConfig, known: Sequence[str] | None) -> list[str] | None:
    """Names for all classes of a model: `known` ones of its checkpoint or data set, or ImageNet's for 1000 classes."""
    if known is None and model.class_num == 1000:
        from torchvision.models import ResNet18_Weights

        # Sorted WordNet ids, the order of ImageNet's labels.
        known = ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    # A model may have more classes than the data it was last trained on.
    return None if known is None else [*known, *(f"class {i}" for i in range(len(known), model.class_num))]


def find_class(wanted: int | str, names: Sequence[str] | None, class_num: int) -> int:
    """The number, 0 … `class_num` − 1, of a class that is given by name (of any case) or by number.

    Args:
        names: of all classes, or None where they have none. A name that looks like a number is taken as a name.

    Raises:
        UserError: for a class that the model does not have, with the nearest names; for a name that several have.
    """
    if isinstance(wanted, str):
        text = " ".join(wanted.split())
        folded = [name.casefold() for name in names or ()]
        found = [i for i, name in enumerate(names or ()) if name == text]
        found = found or [i for i, name in enumerate(folded) if name == text.casefold()]
        if len(found) > 1:
            numbers = " and ".join(map(str, found))
            raise UserError(f"{text!r} is the name of the classes {numbers}: give the number.")
        if found:
            return found[0]
        if not (text.isascii() and text.isdigit() and len(text) <= 18):
            raise UserError(f"the model has no class {text!r}{_nearest(text.casefold(), folded, names, class_num)}")
        wanted = int(text)
    if not 0 <= wanted < class_num:
        raise UserError(f"class {wanted} is out of range; the model has classes 0 to {class_num - 1}.")
    return int(wanted)


def _nearest(text: str, folded: list[str], names: Sequence[str] | None, class_num: int) -> str:
    """The end of the sentence about an unknown name."""
    if not names:
        return f"; its classes have no names: give a number, 0 to {class_num - 1}."
    if len(names) <= 2 * _SUGGESTIONS:
        return f"; it has {', '.join(names)}."
    # Names that hold the text, as "golden retriever" holds "retriever", say more than those that look alike.
    near = [i for i, name in enumerate(folded) if text and text in name]
    alike = difflib.get_close_matches(text, folded, _SUGGESTIONS, cutoff=0.5)
    near += [i for i in map(folded.index, alike) if i not in near]
    if near:
        return f"; near it are {', '.join(names[i] for i in near[:_SUGGESTIONS])}."
    return f"; it has {names[0]}, {names[1]} and {len(names) - 2} more."


def class_label(number: int, names: Sequence[str] | None) -> str:
    """What a class is called in titles: its name, or `class 3` where classes have none."""
    return names[number] if names else f"class {number}"
