"""Model card of a pruned language model: how to load it."""

from __future__ import annotations

from fedlp.models.torchvision_compat import import_note

_CARD = """# {name}, pruned by fedlp

```python
from transformers import {auto}

model = {auto}.from_pretrained("."{trust})
```

{blocks}
"""
_OWN_CODE = (
    "Its blocks differ in width, which no config of transformers' own class describes: `modeling_pruned.py` builds it, "
    "a short file that needs torch and transformers only, and `trust_remote_code=True` runs it. `pruned_blocks` in "
    "`config.json` has the sizes of every block (`per_layer_config` too, in transformers' own form); without heads or "
    "neurons a block has no attention or MLP."
)
_NATIVE = "Its config describes it: no code of fedlp is needed."


def model_card(class_name: str, auto_class: str, has_own_code: bool) -> str:
    """Return the README of a folder with a model of some class."""
    text = _CARD.format(
        name=class_name.removeprefix("Pruned"),
        auto=auto_class,
        trust=", trust_remote_code=True" if has_own_code else "",
        blocks=_OWN_CODE if has_own_code else _NATIVE,
    )
    note = import_note()
    return text if note is None else f"{text}\nWhere it was written {note}.\n"
