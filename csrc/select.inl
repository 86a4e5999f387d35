// Selection by counting: a rank is found by bisecting on the integers, one branchless pass over the row a bit. A row
// fits the first-level cache, so that 32 passes cost less than partitioning it, whose branches nobody can predict.

static int64_t count_above(const int32_t* __restrict row, int64_t count, int32_t value) {
  int64_t above = 0;
  for (int64_t begin = 0; begin < count; begin += 1 << 30) {  // so that 32 bits hold a partial count
    const int64_t end = count - begin > 1 << 30 ? begin + (1 << 30) : count;
    int32_t part = 0;
    for (int64_t i = begin; i < end; ++i) {
      part += row[i] > value;
    }
    above += part;
  }
  return above;
}

// The value that `above` or fewer of the row exceed: its (above + 1)-th largest.
static int32_t largest_but(const int32_t* row, int64_t count, int64_t above) {
  int64_t low = INT32_MIN, high = INT32_MAX;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (count_above(row, count, static_cast<int32_t>(middle)) <= above) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return static_cast<int32_t>(low);
}

// Indices of the values above `value`, and of the first `ties` equal to it, ascending. `index` has room for one more
// than there are: every element is written, and kept or overwritten by the next.
static void compact(const int32_t* row, int64_t count, int32_t value, int64_t ties, int64_t* index) {
  int64_t taken = 0;
  for (int64_t i = 0; i < count; ++i) {
    const bool tie = row[i] == value && ties > 0;
    ties -= tie;
    index[taken] = i;
    taken += row[i] > value || tie;
  }
}
