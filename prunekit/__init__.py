"""Make trained vision-language and text models smaller and faster while keeping their quality."""

from pathlib import Path

_HERE = Path(__file__).parent
# What ms-swift loads: beside the package in a checkout, in it where a wheel was installed.
PLUGINS = next(folder for folder in (_HERE / "plugins", _HERE.parent / "plugins") if folder.is_dir())
