"""Models of which nothing has to be said but a name: reports and sidecars keep the one they had. Others go by that of their class."""

from types import MappingProxyType

NAMED = MappingProxyType(
    {
        "ErnieImageModel": "ernie",
        "HiDreamO1Transformer": "hidream_o1",
        "HunYuanDiTPlain": "hunyuan3d_2_1",
    }
)
