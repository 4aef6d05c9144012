// The Python face of the native core: addresses, sizes and strides in, checked against the memory that the
// caller has (memory.h), and nothing else. No torch. One file for each family of operators.
#include <string>

#include "bindings/memory.h"
#include "cpu/common/dispatch.h"
#include "cpu/common/parallel.h"
#ifdef FK_WITH_CUDA
#include "cuda/common/target.h"
#endif

namespace factorizer {
namespace bindings {

void def_depthwise(py::module_& m);
void def_product(py::module_& m);
void def_windows(py::module_& m);
void def_nmf(py::module_& m);
void def_pointwise(py::module_& m);

}  // namespace bindings
}  // namespace factorizer

namespace py = pybind11;
namespace fk = factorizer;

PYBIND11_MODULE(_native, m) {
  using namespace fk::bindings;
  m.doc() = "Native kernels of factorizer_kernels; see csrc/problems for the meaning of the arguments.";

  m.def("isa", &fk::cpu_isa,
        "The instruction set of the CPU kernels in use; None where they are for others.");
  m.def("compiled_isas", &fk::compiled_isas, "Those that there are kernels for, a comma after each.");
  m.def(
      "set_team_launcher",
      [](Address launcher) { fk::set_team_launcher(reinterpret_cast<fk::TeamLauncher>(launcher)); },
      py::arg("launcher"),
      "Run parallel regions with the function at this address (libgomp's GOMP_parallel); 0: none.");
#ifdef FK_WITH_CUDA
  m.def(
      "cuda_architectures", [] { return std::string(FK_CUDA_ARCHITECTURES); },
      "The compute capabilities that there is machine code for, as in '80,90', and '+' for newer ones.");
  m.def("cuda_versions", &fk::cuda::versions,
        "(driver, runtime) as in 13000; the driver's is 0 where there is none.");
#endif
  py::dict dtypes;
  for (const DTypeName& known : dtype_names) dtypes[known.name] = static_cast<int>(known.dtype);
  m.attr("DTYPES") = dtypes;  // torch's name of each, and the number that stands for it in every call
  def_depthwise(m);
  def_product(m);
  def_windows(m);
  def_nmf(m);
  def_pointwise(m);
}
