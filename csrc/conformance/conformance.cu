// conformance OUT.json: asks this machine's GPU. benchmarks/run_gpu.py runs it; the file is kept in benchmarks/results/.
#include "conformance.cuh"

#include <cstdio>
#include <exception>

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

std::vector<Result> run_on_gpu() {
  std::vector<Result> results;
  for_each_case([&](const char* name, auto kernel) {
    using Kernel = decltype(kernel);
    Result result{name, inputs_of(Kernel::kInputs, Kernel::kInputWords),
                  std::vector<uint32_t>(Kernel::kOutputWords, kUntouched)};
    const Memory in(result.input), out(result.output);
    launch<Kernel>(name, dim3(Kernel::kBlocksX, Kernel::kBlocksY), {in.address(), out.address()}, false, nullptr);
    check_launch(cudaDeviceSynchronize(), name);
    out.fetch(result.output);
    results.push_back(std::move(result));
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
  const auto results = run_on_gpu();
  write(arguments[1], machine(), results);
  std::printf("%zu instructions on %s\n", results.size(), machine().device.c_str());
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
