// window_attention on the CPU: attention inside windows of packed tokens, computed for those that are there, read and
// written where they lie. The definition is sparsify_kernels/window_attention/reference.py.

#include "window_attention.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sparsify {
namespace {

namespace base {
#define SPARSIFY_VECTOR_BYTES 16
#include "vector.inl"
// The kernels need its vectors.
#include "window_attention_rows.inl"
// Likewise.
#include "window_attention_places.inl"
// Likewise.
#include "window_attention.inl"
#include "window_attention_backward.inl"
#undef SPARSIFY_VECTOR_BYTES
}  // namespace base

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define SPARSIFY_VECTOR_BYTES 32
#include "vector.inl"
// The kernels need its vectors.
#include "window_attention_rows.inl"
// Likewise.
#include "window_attention_places.inl"
// Likewise.
#include "window_attention.inl"
#include "window_attention_backward.inl"
#undef SPARSIFY_VECTOR_BYTES
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
namespace avx512 {
#define SPARSIFY_VECTOR_BYTES 64
#include "vector.inl"
// The kernels need its vectors.
#include "window_attention_rows.inl"
// Likewise.
#include "window_attention_places.inl"
// Likewise.
#include "window_attention.inl"
#include "window_attention_backward.inl"
#undef SPARSIFY_VECTOR_BYTES
}  // namespace avx512
#pragma GCC pop_options
#endif

using torch::headeronly::ScalarType;

// Work for one thread, in multiplications: what takes a few times as long as waking a second one.
constexpr int64_t kWorth = 1 << 19;
// What a slab holds at least: each costs an expansion of the bias, and in the backward a sum over the pairs of places.
constexpr int64_t kSlabWindows = 16, kSlabTokens = 512;

template <class Args>
using Run = void (*)(const Args&, int64_t, int64_t);

template <class T, class A>
Run<WindowForward> pick(const WindowForward&) {
#if defined(__x86_64__)
  switch (active_isa()) {
    case Isa::avx512:
      return avx512::Forward<A>::template run<T>;
    case Isa::avx2:
      return avx2::Forward<A>::template run<T>;
    default:
      break;
  }
#endif
  return base::Forward<A>::template run<T>;
}

template <class T, class A>
Run<WindowBackward> pick(const WindowBackward&) {
#if defined(__x86_64__)
  switch (active_isa()) {
    case Isa::avx512:
      return avx512::Backward<A>::template run<T>;
    case Isa::avx2:
      return avx2::Backward<A>::template run<T>;
    default:
      break;
  }
#endif
  return base::Backward<A>::template run<T>;
}

// Runs every item in as many threads as are worth it; `products` multiplications for each pair of tokens and channel.
template <class Args>
void run_items(Float dtype, const Args& args, int64_t products) {
  Run<Args> run = nullptr;
  switch (dtype) {
    case Float::f32:
      run = pick<float, float>(args);
      break;
    case Float::f64:
      run = pick<double, double>(args);
      break;
    case Float::bf16:
      run = pick<Bf16, float>(args);
      break;
    case Float::f16:
      run = pick<Fp16, float>(args);
      break;
  }
  const int64_t tokens = args.in.tokens / args.in.slabs + 1;
  const int64_t cost = tokens * (args.in.tokens / args.in.windows + 8) * products * (args.in.dim + 16);
  torch::stable::parallel_for(0, args.in.slabs * args.in.heads, grain(cost, kWorth),
                              [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

template <class... Parts>
[[noreturn]] void complain(const Parts&... parts) {
  std::ostringstream text;
  (text << "window_attention: windows." << ... << parts);
  throw std::runtime_error(text.str());
}

// The windows must be a partition of the tokens, with at most one at each place; what is said is what the reference
// says. Returns the tokens in the largest.
int64_t check_windows(const WindowInputs& in) {
  int64_t most = 0;
  bool rises = in.start[0] == 0 && in.start[in.windows] == in.tokens;
  for (int64_t w = 0; w < in.windows; ++w) {
    rises = rises && in.start[w] <= in.start[w + 1];
    most = std::max(most, in.start[w + 1] - in.start[w]);
  }
  if (!rises) {
    std::ostringstream text;
    for (int64_t w = 0; w <= in.windows; ++w) {
      text << (w == 0 ? "[" : ", ") << in.start[w];
    }
    complain("start must rise from 0 to the ", in.tokens, " tokens, got ", text.str(), "]");
  }
  std::vector<char> seen(static_cast<size_t>(in.tokens));
  for (int64_t i = 0; i < in.tokens; ++i) {
    const int64_t row = in.member[i];
    if (row < 0 || row >= in.tokens || seen[static_cast<size_t>(row)]) {
      complain("member must name each of ", in.tokens, " tokens once, got ", row, " at [", i, "]");
    }
    seen[static_cast<size_t>(row)] = 1;
  }
  const int64_t places = in.height * in.width;
  std::vector<int64_t> taken(static_cast<size_t>(places), -1);  // by which window
  for (int64_t w = 0; w < in.windows; ++w) {
    for (int64_t i = in.start[w]; i < in.start[w + 1]; ++i) {
      const int64_t place = in.place[i];
      if (place < 0 || place >= places || taken[static_cast<size_t>(place)] == w) {
        complain("place must be in [0, ", places, "), each once a window, got ", place, " at [", i, "]");
      }
      taken[static_cast<size_t>(place)] = w;
    }
  }
  return most;
}

// Memory safety rests on these; the public function has made them, with better words.
void check(const Tensor& x, const char* name, ScalarType dtype, std::initializer_list<int64_t> sizes) {
  const bool fits = x.scalar_type() == dtype && x.dim() == static_cast<int64_t>(sizes.size()) &&
                    std::equal(sizes.begin(), sizes.end(), x.sizes().begin());
  if (!fits) {
    throw std::runtime_error(std::string("window_attention: ") + name + " does not fit qkv in shape or dtype");
  }
}

// Its last axis next to each other, by a copy if need be.
Tensor with_channels(const Tensor& x) {
  return x.stride(x.dim() - 1) == 1 || x.size(x.dim() - 1) == 1 ? x : torch::stable::contiguous(x);
}

// The arguments of both kernels, and what keeps them alive.
class Arguments {
 public:
  Arguments(const Tensor& qkv, const Tensor& bias, const std::optional<Tensor>& scale, const Tensor& member,
            const Tensor& start, const Tensor& place, const std::optional<Tensor>& region, bool cosine)
      : dtype(qkv.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float) {
    if (qkv.dim() != 4 || bias.dim() != 3 || start.dim() != 1 || start.size(0) < 2) {
      throw std::runtime_error("window_attention: qkv must be [N, 3, H, d], bias [H, R, C], windows.start [W + 1]");
    }
    in.tokens = qkv.size(0);
    in.heads = qkv.size(2);
    in.dim = qkv.size(3);
    in.windows = start.size(0) - 1;
    in.height = (bias.size(1) + 1) / 2;
    in.width = (bias.size(2) + 1) / 2;
    in.cosine = cosine;
    check(qkv, "qkv", qkv.scalar_type(), {in.tokens, 3, in.heads, in.dim});
    check(bias, "bias", dtype, {in.heads, 2 * in.height - 1, 2 * in.width - 1});
    check(member, "windows.member", ScalarType::Long, {in.tokens});
    check(start, "windows.start", ScalarType::Long, {in.windows + 1});
    check(place, "windows.place", ScalarType::Long, {in.tokens});
    in.qkv = rows(with_channels(qkv), 2);
    in.bias = kept(bias).const_data_ptr();
    in.member = integers(member);
    in.start = integers(start);
    in.place = integers(place);
    in.scale = nullptr;
    in.region = nullptr;
    if (scale.has_value()) {
      check(*scale, "scale", dtype, {in.heads});
      in.scale = kept(*scale).const_data_ptr();
    }
    if (region.has_value()) {
      check(*region, "windows.region", ScalarType::Long, {in.tokens});
      in.region = integers(*region);
    }
    in.slabs = std::max<int64_t>(1, std::min(in.windows / kSlabWindows, in.tokens / kSlabTokens));
    in.most = check_windows(in);
  }

  // Rows of x, whose axes before the last are [N, 3, H] or [N, H].
  TokenRows rows(const Tensor& x, int64_t head_axis) {
    tensors_.push_back(x);
    return {x.const_data_ptr(), x.stride(0), head_axis == 2 ? x.stride(1) : 0, x.stride(head_axis)};
  }
  const Tensor& kept(const Tensor& x) {
    tensors_.push_back(dense(x));
    return tensors_.back();
  }

  WindowInputs in;
  const ScalarType dtype;  // of sums

 private:
  const int64_t* integers(const Tensor& x) {
    return static_cast<const int64_t*>(kept(x).const_data_ptr());
  }

  std::vector<Tensor> tensors_;
};

// output [N, H, d], lse [N, H].
std::tuple<Tensor, Tensor> window_attention(const Tensor& qkv, const Tensor& bias, const std::optional<Tensor>& scale,
                                            const Tensor& member, const Tensor& start, const Tensor& place,
                                            const std::optional<Tensor>& region, bool cosine) {
  const Arguments given(qkv, bias, scale, member, start, place, region, cosine);
  const WindowInputs& in = given.in;
  Tensor output = torch::stable::new_empty(qkv, {in.tokens, in.heads, in.dim});
  Tensor lse = torch::stable::new_empty(bias, {in.tokens, in.heads});
  run_items(float_type(qkv), WindowForward{in, output.mutable_data_ptr(), lse.mutable_data_ptr()}, 2);
  return {output, lse};
}

// sum = the `count` rows of `length` numbers at `from`, added up in order.
template <class A, class Part>
void add_slabs(const Part* from, int64_t count, int64_t length, A* sum) {
  for (int64_t i = 0; i < length; ++i) {
    double total = 0;
    for (int64_t s = 0; s < count; ++s) {
      total += static_cast<double>(from[s * length + i]);
    }
    sum[i] = static_cast<A>(total);
  }
}

template <class Part>
void add_slabs(ScalarType dtype, const Part* from, int64_t count, int64_t length, void* sum) {
  if (dtype == ScalarType::Double) {
    add_slabs(from, count, length, static_cast<double*>(sum));
  } else {
    add_slabs(from, count, length, static_cast<float*>(sum));
  }
}

// dqkv, dbias, dscale; [0] where not wanted.
std::tuple<Tensor, Tensor, Tensor> window_attention_backward(const Tensor& grad, const Tensor& qkv, const Tensor& bias,
                                                             const std::optional<Tensor>& scale, const Tensor& member,
                                                             const Tensor& start, const Tensor& place,
                                                             const std::optional<Tensor>& region, const Tensor& lse,
                                                             bool cosine, const std::vector<bool>& wanted) {
  Arguments given(qkv, bias, scale, member, start, place, region, cosine);
  const WindowInputs& in = given.in;
  check(grad, "grad", qkv.scalar_type(), {in.tokens, in.heads, in.dim});
  check(lse, "lse", given.dtype, {in.tokens, in.heads});
  if (wanted.size() != 3) {
    throw std::runtime_error("window_attention: wanted must have three parts");
  }
  const auto sized = [](const Tensor& like, bool want, std::initializer_list<int64_t> sizes) {
    return want ? torch::stable::new_empty(like, sizes) : torch::stable::new_empty(like, {0});
  };
  Tensor dqkv = sized(qkv, wanted[0], {in.tokens, 3, in.heads, in.dim});
  Tensor dbias = sized(bias, wanted[1], {in.heads, 2 * in.height - 1, 2 * in.width - 1});
  Tensor dscale = sized(bias, wanted[2], {in.heads});
  const int64_t table = in.heads * in.table();
  const Scratch bias_parts(wanted[1] ? in.slabs * table * static_cast<int64_t>(bias.element_size()) : 0);
  const Scratch scale_parts(wanted[2] ? in.slabs * in.heads * 8 : 0);
  WindowBackward args;
  args.in = in;
  args.grad = given.rows(with_channels(grad), 1);
  args.lse = given.kept(lse).const_data_ptr();
  args.dqkv = wanted[0] ? dqkv.mutable_data_ptr() : nullptr;
  args.dbias = wanted[1] ? bias_parts.data() : nullptr;
  args.dscale = wanted[2] ? static_cast<double*>(scale_parts.data()) : nullptr;
  run_items(float_type(qkv), args, 5);
  if (wanted[1] && given.dtype == ScalarType::Double) {
    add_slabs(given.dtype, static_cast<const double*>(args.dbias), in.slabs, table, dbias.mutable_data_ptr());
  } else if (wanted[1]) {
    add_slabs(given.dtype, static_cast<const float*>(args.dbias), in.slabs, table, dbias.mutable_data_ptr());
  }
  if (wanted[2]) {
    add_slabs(given.dtype, args.dscale, in.slabs, in.heads, dscale.mutable_data_ptr());
  }
  return {dqkv, dbias, dscale};
}

}  // namespace

void register_window_attention(Library& library) {
  library.impl("window_attention", TORCH_BOX(&window_attention));
  library.impl("window_attention_backward", TORCH_BOX(&window_attention_backward));
}

}  // namespace sparsify
