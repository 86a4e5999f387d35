// attention_scores on the CPU: fused attention whose M x N probabilities exist a tile at a time, and their column sums.
// The definition is sparsify_kernels/attention_scores/reference.py.

#include "attention_scores.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common.h"

namespace sparsify {
namespace {

namespace base {
#define SPARSIFY_VECTOR_BYTES 16
#include "vector.inl"
// The kernels need its vectors.
#include "attention_scores.inl"
#include "attention_scores_backward.inl"
#undef SPARSIFY_VECTOR_BYTES
}  // namespace base

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define SPARSIFY_VECTOR_BYTES 32
#include "vector.inl"
// The kernels need its vectors.
#include "attention_scores.inl"
#include "attention_scores_backward.inl"
#undef SPARSIFY_VECTOR_BYTES
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
namespace avx512 {
#define SPARSIFY_VECTOR_BYTES 64
#include "vector.inl"
// The kernels need its vectors.
#include "attention_scores.inl"
#include "attention_scores_backward.inl"
#undef SPARSIFY_VECTOR_BYTES
}  // namespace avx512
#pragma GCC pop_options
#endif

using torch::headeronly::ScalarType;

// Work for one thread, in multiplications: what takes a few times as long as waking a second one.
constexpr int64_t kWorth = 1 << 19;
// Queries of a head that make a second item of work worth packing its keys again.
constexpr int64_t kSlab = 512;

template <class Args>
using Run = void (*)(const Args&, int64_t, int64_t);

template <class T, class A>
Run<AttentionForward> pick(const AttentionForward&) {
  if (std::is_same_v<T, Bf16> && bf16_attention() != nullptr) {
    return bf16_attention()->forward;
  }
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
Run<AttentionBackward> pick(const AttentionBackward&) {
  if (std::is_same_v<T, Bf16> && bf16_attention() != nullptr) {
    return bf16_attention()->backward;
  }
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

// Runs items 0..items, each of `cost` multiplications, in as many threads as are worth it.
template <class Args>
void run_items(ScalarType dtype, const Args& args, int64_t items, int64_t cost) {
  Run<Args> run = nullptr;
  switch (dtype) {
    case ScalarType::Float:
      run = pick<float, float>(args);
      break;
    case ScalarType::Double:
      run = pick<double, double>(args);
      break;
    case ScalarType::BFloat16:
      run = pick<Bf16, float>(args);
      break;
    case ScalarType::Half:
      run = pick<Fp16, float>(args);
      break;
    default:
      throw std::runtime_error("attention_scores: q must be float32, float64, bfloat16 or float16");
  }
  torch::stable::parallel_for(0, items, grain(cost, kWorth),
                              [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

Heads heads_of(const Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.dim() == 4 ? x.stride(3) : 0};
}

Table table_of(const std::optional<Tensor>& x) {
  return x.has_value() ? Table{x->const_data_ptr(), x->stride(0), x->stride(1)} : Table{};
}

// Memory safety rests on these; the public function has made them, with better words.
void check(const Tensor& x, const char* name, ScalarType dtype, std::initializer_list<int64_t> sizes) {
  bool ok = x.scalar_type() == dtype && x.dim() == static_cast<int64_t>(sizes.size());
  int64_t axis = 0;
  for (int64_t size : sizes) {
    ok = ok && x.size(axis++) == size;
  }
  if (!ok) {
    throw std::runtime_error(std::string("attention_scores: ") + name + " does not fit q and k in shape or dtype");
  }
}

void check(const std::optional<Tensor>& x, const char* name, ScalarType dtype, std::initializer_list<int64_t> sizes) {
  if (x.has_value()) {
    check(*x, name, dtype, sizes);
  }
}

ScalarType accumulation(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

AttentionInputs inputs_of(const Tensor& q, const Tensor& k, const std::optional<Tensor>& v,
                          const std::optional<Tensor>& key_bias, const std::optional<Tensor>& query_valid,
                          const std::optional<Tensor>& key_valid, std::optional<double> scale) {
  if (q.dim() != 4 || k.dim() != 4 || (v.has_value() && v->dim() != 4)) {
    throw std::runtime_error("attention_scores: q, k and v must have four axes");
  }
  AttentionInputs in;
  in.samples = q.size(0);
  in.heads = q.size(1);
  in.queries = q.size(2);
  in.dim = q.size(3);
  in.keys = k.size(2);
  in.value_dim = v.has_value() ? v->size(3) : 0;
  check(k, "k", q.scalar_type(), {in.samples, in.heads, in.keys, in.dim});
  check(v, "v", q.scalar_type(), {in.samples, in.heads, in.keys, in.value_dim});
  check(key_bias, "key_bias", accumulation(q), {in.samples, in.keys});
  check(query_valid, "query_valid", ScalarType::Bool, {in.samples, in.queries});
  check(key_valid, "key_valid", ScalarType::Bool, {in.samples, in.keys});
  in.q = heads_of(q);
  in.k = heads_of(k);
  in.v = v.has_value() && in.value_dim > 0 ? heads_of(*v) : Heads{};
  in.key_bias = table_of(key_bias);
  in.query_valid = table_of(query_valid);
  in.key_valid = table_of(key_valid);
  in.scale = scale.has_value() ? *scale : 1 / std::sqrt(static_cast<double>(in.dim));
  return in;
}

// Multiplications for one head.
int64_t work(const AttentionInputs& in) {
  return in.queries * in.keys * (in.dim + in.value_dim + 16) + in.keys * (in.dim + in.value_dim);
}

// to [B, N] = the rows from [B, rows, N] added up in order, times a factor for each sample; in double until the end.
template <class A, class Factor>
void add_rows(const void* from, int64_t samples, int64_t rows, int64_t columns, void* to, const Factor& factor) {
  constexpr int64_t kSome = 64;
  torch::stable::parallel_for(0, samples, grain(rows * columns, kWorth), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const double times = factor(b);
      for (int64_t first = 0; first < columns; first += kSome) {
        const int64_t some = std::min(columns - first, kSome);
        double sum[kSome] = {};
        for (int64_t i = 0; i < rows; ++i) {
          const A* row = static_cast<const A*>(from) + (b * rows + i) * columns + first;
          for (int64_t j = 0; j < some; ++j) {
            sum[j] += static_cast<double>(row[j]);
          }
        }
        A* sums = static_cast<A*>(to) + b * columns + first;
        for (int64_t j = 0; j < some; ++j) {
          sums[j] = static_cast<A>(sum[j] * times);
        }
      }
    }
  });
}

// 1 / (heads * valid queries) of sample b.
double share(const AttentionInputs& in, int64_t b) {
  const bool* flags = static_cast<const bool*>(in.query_valid.data) + b * in.query_valid.batch;
  int64_t count = in.query_valid.data == nullptr ? in.queries : 0;
  for (int64_t i = 0; i < in.queries && in.query_valid.data != nullptr; ++i) {
    count += flags[i * in.query_valid.column];
  }
  return 1.0 / static_cast<double>(in.heads * (count > 0 ? count : 1));
}

// received [B, N], output [B, H, M, dv], lse [B, H, M].
std::tuple<Tensor, Tensor, Tensor> attention_scores(const Tensor& q, const Tensor& k, const std::optional<Tensor>& v,
                                                    const std::optional<Tensor>& key_bias,
                                                    const std::optional<Tensor>& query_valid,
                                                    const std::optional<Tensor>& key_valid,
                                                    std::optional<double> scale) {
  AttentionForward args;
  args.in = inputs_of(q, k, v, key_bias, query_valid, key_valid, scale);
  const AttentionInputs& in = args.in;
  args.slabs = in.queries > kSlab ? in.queries / kSlab : 1;
  const ScalarType dtype = accumulation(q);
  const int64_t rows = in.heads * args.slabs;
  Tensor received = torch::stable::new_empty(q, {in.samples, in.keys}, dtype);
  Tensor output = torch::stable::new_empty(q, {in.samples, in.heads, in.queries, in.value_dim});
  Tensor lse = torch::stable::new_empty(q, {in.samples, in.heads, in.queries}, dtype);
  const Scratch parts(in.samples * rows * in.keys * static_cast<int64_t>(received.element_size()));
  args.received = parts.data();
  args.output = output.mutable_data_ptr();
  args.lse = lse.mutable_data_ptr();
  run_items(q.scalar_type(), args, in.samples * rows, work(in) / args.slabs);
  const auto factor = [&](int64_t b) { return share(in, b); };
  const auto add = dtype == ScalarType::Double ? add_rows<double, decltype(factor)> : add_rows<float, decltype(factor)>;
  add(parts.data(), in.samples, rows, in.keys, received.mutable_data_ptr(), factor);
  return {received, output, lse};
}

// dq, dk, dv, dkey_bias; [0] where not wanted.
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_scores_backward(
    const std::optional<Tensor>& grad_received, const std::optional<Tensor>& grad_output, const Tensor& q,
    const Tensor& k, const std::optional<Tensor>& v, const std::optional<Tensor>& key_bias,
    const std::optional<Tensor>& query_valid, const std::optional<Tensor>& key_valid, const Tensor&, const Tensor& lse,
    std::optional<double> scale, const std::vector<bool>& wanted) {
  AttentionBackward args;
  args.in = inputs_of(q, k, v, key_bias, query_valid, key_valid, scale);
  const AttentionInputs& in = args.in;
  const ScalarType dtype = accumulation(q);
  check(grad_received, "grad_received", dtype, {in.samples, in.keys});
  check(grad_output, "grad_output", q.scalar_type(), {in.samples, in.heads, in.queries, in.value_dim});
  check(lse, "lse", dtype, {in.samples, in.heads, in.queries});
  STD_TORCH_CHECK(wanted.size() == 4, "attention_scores_backward: wanted must be four flags, got ", wanted.size());
  args.grad_received = table_of(grad_received);
  args.grad_output = grad_output.has_value() && in.value_dim > 0 ? heads_of(*grad_output) : Heads{};
  args.lse = heads_of(lse);
  const auto gradient = [](const Tensor& like, bool want) {
    return want ? torch::stable::new_empty(like, like.sizes()) : torch::stable::new_empty(like, {0});
  };
  Tensor dq = gradient(q, wanted[0]), dk = gradient(k, wanted[1]);
  Tensor dv = gradient(v.has_value() ? *v : q, wanted[2] && v.has_value());
  Tensor dbias = wanted[3] ? torch::stable::new_empty(lse, {in.samples, in.keys}) : torch::stable::new_empty(lse, {0});
  const Scratch parts(wanted[3] ? in.samples * in.heads * in.keys * static_cast<int64_t>(lse.element_size()) : 0);
  args.dq = wanted[0] ? dq.mutable_data_ptr() : nullptr;
  args.dk = wanted[1] ? dk.mutable_data_ptr() : nullptr;
  args.dv = wanted[2] && v.has_value() ? dv.mutable_data_ptr() : nullptr;
  args.dkey_bias = wanted[3] ? parts.data() : nullptr;
  run_items(q.scalar_type(), args, in.samples * in.heads, 3 * work(in));
  if (wanted[3]) {
    const auto one = [](int64_t) { return 1.0; };
    const auto add = dtype == ScalarType::Double ? add_rows<double, decltype(one)> : add_rows<float, decltype(one)>;
    add(parts.data(), in.samples, in.heads, in.keys, dbias.mutable_data_ptr(), one);
  }
  return {dq, dk, dv, dbias};
}

}  // namespace

void register_attention_scores(Library& library) {
  library.impl("attention_scores", TORCH_BOX(&attention_scores));
  library.impl("attention_scores_backward", TORCH_BOX(&attention_scores_backward));
}

}  // namespace sparsify
