"""Checkpoints: the released format, read and written, and orbax for the models it cannot express.

    config, params = read("DeepSeek-V4-Flash")  # quantised weights stay quantised
    export(model, "my-model")                   # the same format: other implementations read it, but for number
                                                # formats of our own, which config.json names
    save(model, "run/step-1000")                # anything, research models included
    config, params = restore("run/step-1000")

`model` is any object with `config` and `params`.
"""

from dsv4.checkpoint.config_json import config_from_dict, config_to_dict
from dsv4.checkpoint.errors import CheckpointError
from dsv4.checkpoint.orbax_store import is_orbax, restore, save
from dsv4.checkpoint.reader import read
from dsv4.checkpoint.writer import export

__all__ = [
    "CheckpointError",
    "config_from_dict",
    "config_to_dict",
    "export",
    "is_orbax",
    "read",
    "restore",
    "save",
]
