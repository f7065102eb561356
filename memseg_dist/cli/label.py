"""`memseg label`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field, make_dataclass
from typing import Annotated, Any

from tyro.conf import arg

from memseg_dist.stages import LABELLERS, LabelConfig
from memseg_dist.tools.pseudo_labels import label as run_label

KIND = "--labeller.kind"


def label_command(arguments: Sequence[str]) -> Callable[..., None]:
    """The command with the flags of the labeller that `arguments` name; else of the default."""
    words = [part for text in arguments for part in text.split("=", 1)]
    kind = words[words.index(KIND) + 1] if KIND in words[:-1] else "activation"
    labeller = LABELLERS.get(kind, LABELLERS["activation"])  # else tyro refuses it
    fields = [("labeller", labeller, field(default_factory=labeller))]
    options: Any = make_dataclass("LabelOptions", fields, bases=(LabelConfig,), frozen=True)

    def label(config: Annotated[options, arg(name="")]) -> None:  # type: ignore[valid-type]
        report = run_label(config)
        print(f"{report}\npictures are in {config.out}/panels")

    label.__annotations__["config"] = Annotated[options, arg(name="")]
    label.__doc__ = (
        "Write pseudo labels: shards in, the same shards with masks out.\n\n"
        f"The flags below are those of the labeller {kind!r}; {KIND} shows those of another: "
        f"{', '.join(LABELLERS)}."
    )
    return label
