# Only so that typings/keras/ops is found; the rest is Keras's own.
from keras import ops as ops
from keras import utils as utils
from keras.src import backend as backend
from keras.src import distribution as distribution
from keras.src import dtype_policies as dtype_policies
from keras.src import initializers as initializers
from keras.src import layers as layers
from keras.src import losses as losses
from keras.src import metrics as metrics
from keras.src import optimizers as optimizers
from keras.src import random as random
from keras.src import saving as saving
from keras.src.backend import Variable as Variable
from keras.src.backend.common.keras_tensor import KerasTensor as KerasTensor
from keras.src.backend.common.name_scope import name_scope as name_scope
from keras.src.backend.common.stateless_scope import StatelessScope as StatelessScope
from keras.src.models.model import Model as Model
