"""Readers: one per file format, each of which turns pieces of files into Arrow tables of text and score.

rows         the interface of a reader, and what every reader shares
json_lines   JSON lines, in ranges of bytes
columnar     Parquet, in ranges of row groups; Arrow files
plain_text   text files; comma- and tab-separated values
compression  gzip and zstd, for every reader
remote       files by URL
"""
