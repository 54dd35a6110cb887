"""Methods of tuning the towers: one file each, and an entry in METHODS."""

from dcris.config import METHODS
from dcris.models.adapters.adaptformer import AdaptFormerConfig
from dcris.models.adapters.barleria import BarleriaConfig
from dcris.models.adapters.bitfit import BitFitConfig
from dcris.models.adapters.compacter import CompacterConfig
from dcris.models.adapters.dcris import DcrisConfig
from dcris.models.adapters.etris import EtrisConfig
from dcris.models.adapters.full import FullConfig
from dcris.models.adapters.houlsby import HoulsbyConfig
from dcris.models.adapters.lora import LoraConfig
from dcris.models.adapters.prompts import PromptsConfig

__all__ = ["METHODS"]

METHODS.update(
    adaptformer=AdaptFormerConfig,
    barleria=BarleriaConfig,
    bitfit=BitFitConfig,
    compacter=CompacterConfig,
    dcris=DcrisConfig,
    etris=EtrisConfig,
    full=FullConfig,
    houlsby=HoulsbyConfig,
    lora=LoraConfig,
    prompts=PromptsConfig,
)
