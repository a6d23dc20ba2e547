"""bp_torch in a LightningModule that nobody edits: three callbacks, and checkpoints that load without bp_torch.

python examples/lightning_callbacks.py
"""

import logging
import tempfile
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits

from bp_torch.recipes.callbacks import ConvertLayers, GradientFlow, SparsityReport

# lightning 2.6 walks containers by a name that torch 2.13 deprecated
warnings.filterwarnings("ignore", ".isinstance.treespec, LeafSpec.. is deprecated", FutureWarning)


class Digits(pl.LightningModule):
    """As somebody wrote it, with torch.nn."""

    def __init__(self) -> None:
        super().__init__()
        nn = torch.nn
        hidden = [nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 64), nn.ReLU()]
        self.network = nn.Sequential(*hidden, nn.Linear(64, 10))
        self.loss = nn.CrossEntropyLoss()

    def training_step(self, batch, batch_idx):
        x, t = batch
        return self.loss(self.network(x), t)

    def validation_step(self, batch, batch_idx):
        x, t = batch
        self.log("accuracy", (self.network(x).argmax(1) == t).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    pl.seed_everything(0, verbose=False)
    digits = load_digits()
    x, t = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    rows = torch.randperm(len(x))
    train = torch.utils.data.TensorDataset(x[rows[:1500]], t[rows[:1500]])
    val = torch.utils.data.TensorDataset(x[rows[1500:]], t[rows[1500:]])
    loaders = torch.utils.data.DataLoader(train, 64, shuffle=True), torch.utils.data.DataLoader(val, 297)

    with tempfile.TemporaryDirectory() as folder:
        model, convert = Digits(), ConvertLayers(revert=True)
        trainer = pl.Trainer(
            max_epochs=8,
            accelerator="cpu",
            callbacks=[convert, GradientFlow(), SparsityReport()],
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers")  # the rows are in memory
            trainer.fit(model, *loaders)
        accuracy = float(trainer.callback_metrics["accuracy"])
        print(f"{convert.report}\nvalidation accuracy {accuracy:.2%}")
        assert accuracy > 0.95
        assert "forward" not in vars(model.network[0])  # reverted when the trainer was done

        plain = Digits()
        checkpoint = torch.load(next(Path(folder).rglob("*.ckpt")), weights_only=True)
        plain.load_state_dict(checkpoint["state_dict"])
        plain.eval(), model.eval()
        apart = (plain.network(x) - model.network(x)).abs().max().item()
        print(f"torch.nn with the checkpoint's weights: logits at most {apart:.1e} from the model's")
        assert apart == 0


if __name__ == "__main__":
    main()
