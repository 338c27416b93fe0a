#include "update_kernel_cuda.h"

namespace pyft {

cudaError_t launch_update(const UpdateWork& work, const std::optional<UpdateLayout>& layout, cudaStream_t stream) {
  if (layout.has_value()) {
    if (const std::optional<cudaError_t> error = launch_fixed_update(work, *layout, stream)) {
      return *error;
    }
  }
  return PYFT_LAUNCH(update_kernel<AnyLayouts>, UpTo{work.num_chunks}, kUpdateThreads, stream, work);
}

}  // namespace pyft
