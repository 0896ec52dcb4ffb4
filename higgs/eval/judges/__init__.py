"""Networks and recognisers that judge sound, each in a file of its own behind `higgs.eval.judges.base`."""
