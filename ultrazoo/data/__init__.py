"""Text in Parquet -> masked batches: streaming or cached, packed, in an order that can be resumed exactly."""

from ultrazoo.data import requirements as requirements
from ultrazoo.data.batch import Batch
from ultrazoo.data.build import build_data
from ultrazoo.data.module import DataModule

__all__ = ["Batch", "DataModule", "build_data"]
