from torch.nn.modules import *
