from prunekit.errors import run_script
from prunekit.knockout.search import main

if __name__ == "__main__":
    run_script(main)
