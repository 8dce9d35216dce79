"""Other libraries' protocols over our values: small adapters, most needing an optional dependency of their own.

===================================================  ============================================  ===================
``botorch.MercerModel``                              a fitted model in BoTorch's terms             ``mercer[bo]``
``continual.ContinualStrategy``, ``EstimatorHooks``  experiences, replay, metrics as in Avalanche  none
``river.RiverRegressor``, ``RiverClassifier``        an estimator that takes row by row            ``mercer[streams]``
===================================================  ============================================  ===================
"""
