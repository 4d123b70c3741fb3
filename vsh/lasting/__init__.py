"""vsh.lasting: sessions that outlive their clients, seen from the host."""
