// The search for values so small that units which multiply bf16 without widening it lose them: for those, numbers below
// 2^-126 are zero. Included inside the target of one.

// Whether a value is not 0 but below 2^kExponent.
template <int kExponent>
static bool has_values_below(const Bf16* row, int64_t count) {
  constexpr uint16_t kLimit = (127 + kExponent) << 7;
  uint16_t least = 0xFFFF;
  for (int64_t c = 0; c < count; ++c) {
    const uint16_t below = static_cast<uint16_t>((row[c].bits & 0x7FFF) - 1);  // 0 becomes the largest of all
    least = below < least ? below : least;
  }
  return least < kLimit - 1;
}
