"""SliME ("Beyond LLaVA-HD: Diving into High-Resolution Large Multimodal Models"), small enough to read.

`python -m sliming` lists what there is to run; the README has the reading path.
"""

from sliming.model import Batch, SliME, SliMEConfig
from sliming.slicer import Slices, choose_grid, open_image, slice_image

__all__ = ["Batch", "SliME", "SliMEConfig", "Slices", "choose_grid", "open_image", "slice_image"]
__version__ = "0.1.0"
