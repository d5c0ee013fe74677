from prunekit.errors import run_script
from prunekit.tagger.ner import main

if __name__ == "__main__":
    run_script(main)
