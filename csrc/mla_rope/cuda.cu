// mla_rope and its backward on Hopper: a block has one token and some of its heads, and takes their numbers 16 bytes at a time.
//
// The shared key is turned once a block and written to each of its heads. Its gradient, a sum over all heads, is the work of one more
// block a token: 32 partial sums over every 32nd head, then those in order, whatever the width of an access.

#include "op.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "../common/device.cuh"

namespace r1mega {
namespace {

constexpr int kThreads = 256;
constexpr int kAtOnce = 4;       // loads that a thread has in flight together
constexpr int kSums = 32;        // partial sums of the shared key's gradient
constexpr int kColumns = kThreads / kSums;
constexpr int64_t kItems = kThreads * kAtOnce;  // of keys and values in a block, about

// Numbers of an access: kWide, or one; a pair that is turned has two of them at least.
template <typename T, bool kWide>
struct Access {
  static constexpr int kCount = kWide ? kVector<T> : 1;
  static constexpr int kPairs = kCount > 1 ? kCount / 2 : 1;
  using Plain = Vector<T, kCount>;
  using Pairs = Vector<T, 2 * kPairs>;
  using Half = Vector<T, kPairs>;
};

template <typename V, typename T>
__device__ __forceinline__ V load_as(const T* from) {
  return *reinterpret_cast<const V*>(from);
}

template <typename V, typename T>
__device__ __forceinline__ void store_as(T* to, const V& values) {
  *reinterpret_cast<V*>(to) = values;
}

// Products are rounded before they are added, as plain torch has it.
__device__ __forceinline__ float product(float x, float y) { return __fmul_rn(x, y); }
__device__ __forceinline__ double product(double x, double y) { return __dmul_rn(x, y); }

template <typename T>
struct Arguments {
  using acc_t = at::opmath_type<T>;
  RopeSizes n;
  RopeStrides of_query, of_keys, of_other;  // of_keys: key_value, or the key's gradient; of_other: shared key, or value's gradient
  const T *query, *keys, *other;
  const acc_t *cos, *sin;
  T *to_query, *to_keys, *to_other;  // to_other: the value, or the shared key's gradient
  int64_t heads;                     // of a block
};

template <typename Numbers, typename T, typename acc_t>
__device__ __forceinline__ void turned(const Numbers& pairs, const acc_t* cos, const acc_t* sin, T* first_half, T* second_half) {
  constexpr int kPairs = sizeof(Numbers) / sizeof(T) / 2;
  Vector<T, kPairs> first, second;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const acc_t x = pairs.value[2 * i], y = pairs.value[2 * i + 1];
    first.value[i] = static_cast<T>(product(x, cos[i]) - product(y, sin[i]));
    second.value[i] = static_cast<T>(product(y, cos[i]) + product(x, sin[i]));
  }
  store_as(first_half, first);
  store_as(second_half, second);
}

template <typename T, bool kWide>
__global__ void __launch_bounds__(kThreads) forward_kernel(const Arguments<T> a) {
  using A = Access<T, kWide>;
  using acc_t = at::opmath_type<T>;
  extern __shared__ __align__(16) char shared_memory[];
  T* turned_key = reinterpret_cast<T*>(shared_memory);
  const RopeSizes& n = a.n;
  const int64_t token = blockIdx.x, s = token / n.batch, b = token % n.batch, half = n.half();
  const int64_t first_head = static_cast<int64_t>(blockIdx.y) * a.heads;
  const acc_t *cos = a.cos + s * half, *sin = a.sin + s * half;
  // widths in items: of a head they fit 32 bits, and so do those of a block
  const int plain = n.nope / A::kCount, pairs = half / A::kPairs, query_items = plain + pairs;
  const int both_items = n.both_width() / A::kCount, rope_items = n.rope / A::kCount;
  const int key_heads = max(int64_t(0), min(a.heads, n.key_heads - first_head));
  const int query_heads = max(int64_t(0), min(a.heads, n.query_heads - first_head));

  if (key_heads > 0) {
    const T* from = a.other + s * a.of_other.sequence + b * a.of_other.batch;
    for (int i = threadIdx.x; i < pairs; i += kThreads) {
      const int at = i * A::kPairs;
      typename A::Pairs held;
      if constexpr (kWide) {
        held = load_as<typename A::Pairs>(from + 2 * at);
      } else {  // a pair need not start at an even number
        held.value[0] = from[2 * at], held.value[1] = from[2 * at + 1];
      }
      turned(held, cos + at, sin + at, turned_key + at, turned_key + half + at);
    }
  }
  {
    const T* from = a.keys + s * a.of_keys.sequence + b * a.of_keys.batch + first_head * a.of_keys.head;
    T* to_key = a.to_keys + (token * n.key_heads + first_head) * n.query_width();
    T* to_value = a.to_other + (token * n.key_heads + first_head) * n.value;
    const int items = key_heads * both_items;
    for (int base = threadIdx.x; base < items; base += kThreads * kAtOnce) {
      typename A::Plain held[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int item = base + u * kThreads;
        if (item >= items) break;
        const int head = item / both_items, column = item - head * both_items;
        held[u] = load_as<typename A::Plain>(from + head * a.of_keys.head + column * A::kCount);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int item = base + u * kThreads;
        if (item >= items) break;
        const int head = item / both_items, column = item - head * both_items;
        T* to = column < plain ? to_key + head * n.query_width() + column * A::kCount
                               : to_value + head * n.value + (column - plain) * A::kCount;
        store_as(to, held[u]);
      }
    }
  }
  {
    const T* from = a.query + s * a.of_query.sequence + b * a.of_query.batch + first_head * a.of_query.head;
    T* to = a.to_query + (token * n.query_heads + first_head) * n.query_width();
    const int items = query_heads * query_items;
    for (int base = threadIdx.x; base < items; base += kThreads * kAtOnce) {
      typename A::Pairs held[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int item = base + u * kThreads;
        if (item >= items) break;
        const int head = item / query_items, column = item - head * query_items;
        const T* own = from + head * a.of_query.head;
        if constexpr (kWide) {
          held[u] = load_as<typename A::Pairs>(own + column * A::kCount);
        } else if (column < plain) {
          held[u].value[0] = own[column];
        } else {
          held[u] = {own[n.nope + 2 * (column - plain)], own[n.nope + 2 * (column - plain) + 1]};
        }
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int item = base + u * kThreads;
        if (item >= items) break;
        const int head = item / query_items, column = item - head * query_items;
        T* own = to + head * n.query_width();
        if (column < plain) {
          if constexpr (kWide) {
            store_as(own + column * A::kCount, held[u]);
          } else {
            own[column] = held[u].value[0];
          }
        } else {
          const int at = (column - plain) * A::kPairs;
          turned(held[u], cos + at, sin + at, own + n.nope + at, own + n.nope + half + at);
        }
      }
    }
  }
  if (key_heads == 0) return;
  __syncthreads();
  T* to = a.to_keys + (token * n.key_heads + first_head) * n.query_width() + n.nope;
  for (int item = threadIdx.x; item < key_heads * rope_items; item += kThreads) {
    const int head = item / rope_items, at = (item - head * rope_items) * A::kCount;
    store_as(to + head * n.query_width() + at, load_as<typename A::Plain>(turned_key + at));
  }
}

// The gradient of a token's shared key. `partial`: kThreads accesses of sums; `total`: rope of them.
template <typename T, bool kWide>
__device__ __forceinline__ void sum_over_heads(const Arguments<T>& a, int64_t token, at::opmath_type<T>* partial, at::opmath_type<T>* total) {
  using A = Access<T, kWide>;
  using acc_t = at::opmath_type<T>;
  const RopeSizes& n = a.n;
  const int64_t s = token / n.batch, b = token % n.batch;
  const T* from = a.keys + s * a.of_keys.sequence + b * a.of_keys.batch + n.nope;
  const int columns = n.rope / A::kCount, column = threadIdx.x % kColumns, part = threadIdx.x / kColumns;
  for (int first = 0; first < columns; first += kColumns) {
    acc_t sum[A::kCount] = {};
    if (first + column < columns) {
      const T* own = from + (first + column) * A::kCount;
#pragma unroll 4
      for (int64_t head = part; head < n.key_heads; head += kSums) {
        const auto held = load_as<typename A::Plain>(own + head * a.of_keys.head);
#pragma unroll
        for (int i = 0; i < A::kCount; ++i) sum[i] += static_cast<acc_t>(held.value[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < A::kCount; ++i) partial[(part * kColumns + column) * A::kCount + i] = sum[i];
    __syncthreads();
    const int wide = min(columns - first, kColumns) * A::kCount;
    if (threadIdx.x < wide) {
      acc_t whole = 0;
      for (int i = 0; i < kSums; ++i) whole += partial[i * kColumns * A::kCount + threadIdx.x];
      total[first * A::kCount + threadIdx.x] = whole;
    }
    __syncthreads();
  }
  const acc_t *cos = a.cos + s * n.half(), *sin = a.sin + s * n.half();
  for (int i = threadIdx.x; i < n.half(); i += kThreads) {
    const acc_t x = total[i], y = total[n.half() + i];
    a.to_other[token * n.rope + 2 * i] = static_cast<T>(product(x, cos[i]) + product(y, sin[i]));
    a.to_other[token * n.rope + 2 * i + 1] = static_cast<T>(product(y, cos[i]) - product(x, sin[i]));
  }
}

template <typename T, bool kWide>
__global__ void __launch_bounds__(kThreads) backward_kernel(const Arguments<T> a) {
  using A = Access<T, kWide>;
  using acc_t = at::opmath_type<T>;
  extern __shared__ __align__(16) char shared_memory[];
  const RopeSizes& n = a.n;
  const int64_t token = blockIdx.x, s = token / n.batch, b = token % n.batch, half = n.half();
  if (blockIdx.y == 0) {  // first, since it is the longest
    acc_t* partial = reinterpret_cast<acc_t*>(shared_memory);
    sum_over_heads<T, kWide>(a, token, partial, partial + kThreads * A::kCount);
    return;
  }
  const int64_t first_head = static_cast<int64_t>(blockIdx.y - 1) * a.heads;
  const acc_t *cos = a.cos + s * half, *sin = a.sin + s * half;
  const int plain = n.nope / A::kCount, pairs = half / A::kPairs, query_items = plain + pairs;
  const int both_items = n.both_width() / A::kCount;
  const int key_heads = max(int64_t(0), min(a.heads, n.key_heads - first_head));
  const int query_heads = max(int64_t(0), min(a.heads, n.query_heads - first_head));
  {
    const T* of_key = a.keys + s * a.of_keys.sequence + b * a.of_keys.batch + first_head * a.of_keys.head;
    const T* of_value = a.other + s * a.of_other.sequence + b * a.of_other.batch + first_head * a.of_other.head;
    T* to = a.to_keys + (token * n.key_heads + first_head) * n.both_width();
    const int items = key_heads * both_items;
    for (int base = threadIdx.x; base < items; base += kThreads * kAtOnce) {
      typename A::Plain held[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int item = base + u * kThreads;
        if (item >= items) break;
        const int head = item / both_items, column = item - head * both_items;
        held[u] = load_as<typename A::Plain>(
            column < plain ? of_key + head * a.of_keys.head + column * A::kCount
                           : of_value + head * a.of_other.head + (column - plain) * A::kCount);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int item = base + u * kThreads;
        if (item < items) store_as(to + static_cast<int64_t>(item) * A::kCount, held[u]);
      }
    }
  }
  {
    const T* from = a.query + s * a.of_query.sequence + b * a.of_query.batch + first_head * a.of_query.head;
    T* to = a.to_query + (token * n.query_heads + first_head) * n.query_width();
    const int items = query_heads * query_items;
    for (int base = threadIdx.x; base < items; base += kThreads * kAtOnce) {
      typename A::Pairs held[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int item = base + u * kThreads;
        if (item >= items) break;
        const int head = item / query_items, column = item - head * query_items;
        const T* own = from + head * a.of_query.head;
        if (column < plain) {
          const auto values = load_as<typename A::Plain>(own + column * A::kCount);
#pragma unroll
          for (int i = 0; i < A::kCount; ++i) held[u].value[i] = values.value[i];
        } else {
          const int at = (column - plain) * A::kPairs;
          const auto first = load_as<typename A::Half>(own + n.nope + at);
          const auto second = load_as<typename A::Half>(own + n.nope + half + at);
#pragma unroll
          for (int i = 0; i < A::kPairs; ++i) {
            const acc_t x = first.value[i], y = second.value[i];
            held[u].value[2 * i] = static_cast<T>(product(x, cos[at + i]) + product(y, sin[at + i]));
            held[u].value[2 * i + 1] = static_cast<T>(product(y, cos[at + i]) - product(x, sin[at + i]));
          }
        }
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int item = base + u * kThreads;
        if (item >= items) break;
        const int head = item / query_items, column = item - head * query_items;
        T* own = to + head * n.query_width();
        if constexpr (kWide) {
          store_as(own + column * A::kCount, held[u]);
        } else if (column < plain) {
          own[column] = held[u].value[0];
        } else {
          own[n.nope + 2 * (column - plain)] = held[u].value[0];
          own[n.nope + 2 * (column - plain) + 1] = held[u].value[1];
        }
      }
    }
  }
}

template <typename T>
bool strides_fit(const T* base, const RopeStrides& strides) {
  return fits16(base, strides.sequence) && fits16(base, strides.batch) && fits16(base, strides.head);
}

// True where 16-byte accesses stay within parts of heads and on multiples of 16 bytes.
template <typename T>
bool fits_wide(const Arguments<T>& a) {
  if (a.n.nope % kVector<T> != 0 || a.n.rope % kVector<T> != 0 || a.n.value % kVector<T> != 0) return false;
  return strides_fit(a.query, a.of_query) && strides_fit(a.keys, a.of_keys) && strides_fit(a.other, a.of_other);
}

// How many heads a block takes: about kItems accesses of keys and values, or of queries where there are no others.
template <typename T>
int64_t heads_of_block(const RopeSizes& n, bool wide) {
  const int64_t width = ceil_div(std::max(n.query_width(), n.both_width()), wide ? kVector<T> : 1);
  const int64_t heads = std::max(n.query_heads, n.key_heads);
  const int64_t fewest = ceil_div(heads, 32768);  // what a grid's second dimension takes
  return std::max(fewest, std::clamp<int64_t>(kItems / std::max<int64_t>(width, 1), 1, std::max<int64_t>(heads, 1)));
}

void check_grid(const char* op, const RopeSizes& n) {
  TORCH_CHECK_VALUE(
      n.tokens() <= std::numeric_limits<int32_t>::max(), op, ": expected at most 2^31 - 1 tokens, got ", n.tokens());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> mla_rope_cuda(
    const at::Tensor& query_any, const at::Tensor& both_any, const at::Tensor& shared_any, const at::Tensor& cos_any,
    const at::Tensor& sin_any, int64_t nope) {
  const RopeSizes n = check_mla_rope(query_any, both_any, shared_any, cos_any, sin_any, nope);
  check_grid("mla_rope", n);
  const c10::cuda::CUDAGuard guard(query_any.device());
  const at::Tensor query = dense_last(query_any), both = dense_last(both_any), shared = dense_last(shared_any);
  const at::Tensor cos = cos_any.contiguous(), sin = sin_any.contiguous();
  at::Tensor turned_query = at::empty({n.sequence, n.batch, n.query_heads, n.query_width()}, query.options());
  at::Tensor key = at::empty({n.sequence, n.batch, n.key_heads, n.query_width()}, query.options());
  at::Tensor value = at::empty({n.sequence, n.batch, n.key_heads, n.value}, query.options());
  if (n.tokens() == 0 || std::max(n.query_heads, n.key_heads) == 0) return {turned_query, key, value};
  const auto stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, query.scalar_type(), "mla_rope", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    Arguments<scalar_t> a{
        n, RopeStrides(query), RopeStrides(both), RopeStrides(shared),
        query.const_data_ptr<scalar_t>(), both.const_data_ptr<scalar_t>(), shared.const_data_ptr<scalar_t>(),
        cos.const_data_ptr<acc_t>(), sin.const_data_ptr<acc_t>(),
        turned_query.mutable_data_ptr<scalar_t>(), key.mutable_data_ptr<scalar_t>(), value.mutable_data_ptr<scalar_t>(), 0};
    const bool wide = fits_wide(a);
    a.heads = heads_of_block<scalar_t>(n, wide);
    const dim3 grid(grid_of(n.tokens()), grid_of(ceil_div(std::max(n.query_heads, n.key_heads), a.heads)));
    const auto kernel = wide ? forward_kernel<scalar_t, true> : forward_kernel<scalar_t, false>;
    kernel<<<grid, kThreads, n.rope * sizeof(scalar_t), stream>>>(a);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {turned_query, key, value};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> mla_rope_backward_cuda(
    const at::Tensor& query_any, const at::Tensor& key_any, const at::Tensor& value_any, const at::Tensor& cos_any,
    const at::Tensor& sin_any, int64_t nope) {
  const RopeSizes n = check_mla_rope_backward(query_any, key_any, value_any, cos_any, sin_any, nope);
  check_grid("mla_rope_backward", n);
  const c10::cuda::CUDAGuard guard(query_any.device());
  const at::Tensor query = dense_last(query_any), key = dense_last(key_any), value = dense_last(value_any);
  const at::Tensor cos = cos_any.contiguous(), sin = sin_any.contiguous();
  at::Tensor to_query = at::empty({n.sequence, n.batch, n.query_heads, n.query_width()}, query.options());
  at::Tensor to_both = at::empty({n.sequence, n.batch, n.key_heads, n.both_width()}, query.options());
  at::Tensor to_shared = at::empty({n.sequence, n.batch, n.rope}, query.options());
  if (n.tokens() == 0) return {to_query, to_both, to_shared};
  const auto stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, query.scalar_type(), "mla_rope_backward", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    Arguments<scalar_t> a{
        n, RopeStrides(query), RopeStrides(key), RopeStrides(value),
        query.const_data_ptr<scalar_t>(), key.const_data_ptr<scalar_t>(), value.const_data_ptr<scalar_t>(),
        cos.const_data_ptr<acc_t>(), sin.const_data_ptr<acc_t>(),
        to_query.mutable_data_ptr<scalar_t>(), to_both.mutable_data_ptr<scalar_t>(), to_shared.mutable_data_ptr<scalar_t>(), 0};
    const bool wide = fits_wide(a);
    a.heads = heads_of_block<scalar_t>(n, wide);
    const int64_t groups = ceil_div(std::max(n.query_heads, n.key_heads), a.heads);
    const dim3 grid(grid_of(n.tokens()), static_cast<unsigned>(groups + 1));
    const size_t sums = kThreads * (wide ? kVector<scalar_t> : 1) + n.rope;
    const auto kernel = wide ? backward_kernel<scalar_t, true> : backward_kernel<scalar_t, false>;
    kernel<<<grid, kThreads, sums * sizeof(acc_t), stream>>>(a);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {to_query, to_both, to_shared};
}

}  // namespace

TORCH_LIBRARY_IMPL(r1mega, CUDA, m) {
  m.impl("mla_rope", mla_rope_cuda);
  m.impl("mla_rope_backward", mla_rope_backward_cuda);
}

}  // namespace r1mega
