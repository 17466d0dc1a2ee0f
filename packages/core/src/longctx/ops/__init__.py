"""The public ops, one file a family: semantic checks, dispatch, ``torch.library`` contract."""
