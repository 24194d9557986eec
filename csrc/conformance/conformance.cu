// conformance OUT.json: asks this machine's GPU. benchmarks/run_gpu.py runs it; benchmarks/results/ keeps the file.
#include "conformance.cuh"

#include <cstdio>
#include <stdexcept>

#include "../kernels/launch.cuh"
#include "results.h"

namespace shrank::conformance {
namespace {

void check(cudaError_t error) { check_launch(error, "conformance"); }

// Words on the GPU.
class Memory {
 public:
  explicit Memory(const std::vector<uint32_t>& words) : bytes_(words.size() * 4) {
    check(cudaMalloc(&address_, bytes_));
    check(cudaMemcpy(address_, words.data(), bytes_, cudaMemcpyHostToDevice));
  }
  ~Memory() { cudaFree(address_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void* address() const { return address_; }
  void fetch(std::vector<uint32_t>& words) const {
    check(cudaMemcpy(words.data(), address_, bytes_, cudaMemcpyDeviceToHost));
  }

 private:
  std::size_t bytes_;
  void* address_ = nullptr;
};

template <typename Kernel> std::vector<uint32_t> ask(const char* name, const std::vector<uint32_t>& input) {
  std::vector<uint32_t> output(Kernel::kOutputWords, kUntouched);
  const Memory in(input), out(output);
  launch<Kernel>(name, dim3(Kernel::kBlocksX, Kernel::kBlocksY), {in.address(), out.address()}, false, nullptr);
  check_launch(cudaDeviceSynchronize(), name);
  out.fetch(output);
  return output;
}

// A kernel that fails takes the GPU's context with it: `failure` names it, and the results end before it.
std::vector<Result> run_on_gpu(std::string& failure) {
  std::vector<Result> results;
  for_each_case([&](const char* name, auto kernel) {
    using Kernel = decltype(kernel);
    if (!failure.empty()) return;
    const std::vector<uint32_t> input = inputs_of(Kernel::kInputs, Kernel::kInputWords);
    try {
      results.push_back({name, input, ask<Kernel>(name, input)});
    } catch (const std::exception& error) {
      failure = error.what();
    }
  });
  return results;
}

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

Machine machine() {
  cudaDeviceProp properties;
  int driver = 0, runtime = 0;
  check(cudaGetDeviceProperties(&properties, 0));
  check(cudaDriverGetVersion(&driver));
  check(cudaRuntimeGetVersion(&runtime));
  return {properties.name, std::to_string(properties.major) + "." + std::to_string(properties.minor), version(driver),
          version(runtime)};
}

}  // namespace
}  // namespace shrank::conformance

int main(int count, char** arguments) try {
  using namespace shrank::conformance;
  if (count != 2) throw std::runtime_error("usage: conformance OUT.json");
  const Machine gpu = machine();
  std::string failure;
  const auto results = run_on_gpu(failure);
  write(arguments[1], gpu, results);
  std::printf("%zu instructions on %s\n", results.size(), gpu.device.c_str());
  if (!failure.empty()) throw std::runtime_error(failure);
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
