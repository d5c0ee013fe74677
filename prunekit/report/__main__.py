from prunekit.errors import run_script

from .figures import main

run_script(main)
