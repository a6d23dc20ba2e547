from bp_torch.functional import *
