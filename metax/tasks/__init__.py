"""Problems to train on: data sets, models, and the tasks made of them."""
