"""pyft's AdamW in Lightning: `configure_optimizers` returns it, and it clips and skips non-finite steps itself.

pip install pyft lightning scikit-learn && python examples/lightning_optimizer.py
"""

import lightning
import torch
from sklearn.datasets import load_wine
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyft


class Wine(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 3))

    def training_step(self, batch: list[torch.Tensor], number: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> dict[str, object]:
        named = self.named_parameters()
        optimizer = pyft.optim.AdamW(named, lr=1e-2, clip_norm=1.0, on_nonfinite="skip", state_dtype="int8")
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main() -> None:
    lightning.seed_everything(0)
    features, labels = load_wine(return_X_y=True)
    x = torch.tensor((features - features.mean(0)) / features.std(0), dtype=torch.float32)
    x_train, x_test, y_train, y_test = train_test_split(x, torch.tensor(labels), test_size=0.3, random_state=0)
    loader = DataLoader(TensorDataset(x_train, y_train), batch_size=16, shuffle=True)

    model = Wine()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    # gradient_clip_val is left off: the optimizer clips.
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=10, **quiet)
    trainer.fit(model, loader)
    print(trainer.optimizers[0].last_step)
    print(f"test accuracy {(model.net(x_test).argmax(1) == y_test).float().mean():.4f}")


if __name__ == "__main__":
    main()
