"""Prepare: the text that a recipe names becomes a folder of packed, checksummed windows of token ids.

run       prepare(), merge(), verify(): the prepared folder from start to end
setup     opens the sources, trains or loads the tokenizer, chooses the encoder's engine
splits    checks that training and validation get a window each
corpus    what all parts share (CorpusSpec), and how far each part is (PartProgress)
workers   distributes the parts over processes, with one progress bar
part      hashes, filters, encodes and writes one part
merge     joins the parts into the prepared folder
unknown   refuses text that the tokenizer does not know
inspect   prints windows in the order of training
"""

from isoflop.utils.callable_package import make_callable

make_callable(__name__, "isoflop.prepare.run")
