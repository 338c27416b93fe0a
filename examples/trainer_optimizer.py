"""pyft's AdamW in the Trainer of transformers: it clips and skips non-finite steps itself, with 8-bit moments.

pip install pyft transformers accelerate scikit-learn && python examples/trainer_optimizer.py
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, get_scheduler, set_seed

import pyft

EPOCHS, BATCH = 12, 32


def main() -> None:
    set_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    samples = [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, digits.target, strict=True)]
    train, test = train_test_split(samples, test_size=0.25, random_state=0, stratify=digits.target)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=96, num_labels=10,
    )  # fmt: skip
    model = ViTForImageClassification(config)

    optimizer = pyft.optim.AdamW(
        model.named_parameters(), lr=3e-3, clip_norm=1.0, on_nonfinite="skip", state_dtype="int8"
    )
    steps = EPOCHS * -(-len(train) // BATCH)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=steps // 10, num_training_steps=steps)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, use_cpu=True, seed=0,
            max_grad_norm=0.0,  # the Trainer's own clipping, which would come on top
            save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=train, optimizers=(optimizer, scheduler))
        trainer.train()
        output = trainer.predict(test)
    print(optimizer.last_step)
    print(f"test accuracy {(output.predictions.argmax(1) == output.label_ids).mean():.4f}")


if __name__ == "__main__":
    main()
