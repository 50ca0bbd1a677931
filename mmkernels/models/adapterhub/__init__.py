"""AdapterHub: adapters, compositions of them and AdapterFusion in the user's own Hugging Face model, and their folders.

    model = BertForMaskedLM.from_pretrained(...)
    hub = AdapterHub(model)
    hub.add_adapter("en", "seq_bn_inv")
    hub.train_adapter("en")              # everything else is frozen
    loss = model(**batch).loss           # the model itself is what runs, trains, compiles and saves
    hub.save_adapter("en", folder)       # a folder of the library `adapters`, which reads it, as this reads that library's
    hub.set_active(Stack("en", "ner"))

hub.py        adding, activating, training adapters and heads       heads.py      heads of the library's models
layouts.py    where adapters sit in which models                    folders.py    their files, also those of older versions
"""

from ...modules.adapter import PRESETS, AdapterConfig, FusionConfig
from .hub import AdapterHub

__all__ = ["PRESETS", "AdapterConfig", "AdapterHub", "FusionConfig"]
