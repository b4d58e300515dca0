"""The concept table of a source while it is prepared."""

from detclipv2_jax.data.prepare import index_writer


def test_table_counts_and_merges_spellings():
    table = index_writer.ConceptCounter()
    assert table.add("Traffic Light", count=0) == 0
    assert table.add("a cat on a mat", vocabulary=False) == 1
    assert [table.add(" traffic  LIGHT"), table.add("traffic light")] == [0, 0]
    assert table.add("dog") == 2
    assert (table.names, table.counts) == (["traffic light", "a cat on a mat", "dog"], [2, 1, 1])
    assert table.vocabulary == [True, False, True] and len(table) == 3
    table.add("a cat on a mat")  # a phrase of another record
    assert table.vocabulary[1]
