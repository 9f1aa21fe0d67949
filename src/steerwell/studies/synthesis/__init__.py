"""The synthesis study: does steered text train better safety detectors than prompted text (arXiv 2605.28664)?"""
