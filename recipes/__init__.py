"""Lightning recipes that train with bp_torch on real data; installed as ``bp_torch.recipes``.

They need the extra ``recipes`` (``pip install 'bp-torch[recipes]'``).
"""
