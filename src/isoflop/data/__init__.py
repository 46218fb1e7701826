"""Data: text -> documents -> ids -> windows -> order -> step.

    text       sources.py opens what the recipe names, in parts; files.py, hub.py and readers/ find and read the files
    documents  documents.py checks and filters rows; selection.py drops duplicates and low scores over all parts
    ids        encoding.py encodes with the tokenizer of tokenizers.py, each document ended by its end-of-text id
    windows    windows.py packs ids into disjoint windows, in Arrow shards; manifest.py describes the prepared folder
    order      order.py maps (seed, step) to windows by a keyed permutation per epoch; every rank takes its micro-batches

`isoflop.prepare` runs the first four into a folder; training reads the last two. notes.py warns of surprising sizes.
"""
