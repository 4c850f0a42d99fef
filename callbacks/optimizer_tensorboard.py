class OptimizerTensorBoard: pass
