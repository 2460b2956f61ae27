def run(program, work): pass
