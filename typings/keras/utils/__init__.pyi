from typing import Any

from keras.src.trainers.data_adapters.py_dataset_adapter import PyDataset as PyDataset
from keras.src.utils.rng_utils import set_random_seed as set_random_seed

def unpack_x_y_sample_weight(data: Any) -> tuple[Any, Any, Any]: ...
