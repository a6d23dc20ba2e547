"""The mathematics: one file per layer, each a ``torch.autograd.Function`` with an explicit backward."""
