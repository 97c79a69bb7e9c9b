"""Sub-networks in the formats of other programs: Hugging Face, GGUF, Nemotron-NAS, and tables of slices."""

from flextron.export.export import FORMATS, export, format_for, holds
from flextron.export.format import Format
from flextron.export.slices import write_slices
from flextron.export.source import Exported, Source

__all__ = ["FORMATS", "Exported", "Format", "Source", "export", "format_for", "holds", "write_slices"]
