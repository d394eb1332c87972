from keras.src.trainers.data_adapters.py_dataset_adapter import PyDataset as PyDataset
