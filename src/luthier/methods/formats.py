"""How each method's adapters look in PEFT's files."""

from __future__ import annotations

from luthier.methods.dora.files import DORA_FILES
from luthier.methods.file_format import FileFormat
from luthier.methods.ia3.files import IA3_FILES
from luthier.methods.lora.files import LORA_FILES

FORMATS: dict[str, FileFormat] = {form.method: form for form in (LORA_FILES, DORA_FILES, IA3_FILES)}
"""`AdapterSpec.method` -> its files."""
